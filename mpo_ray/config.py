"""The schema of a run file and its defaults.

The models hold what the file says, after `--set` and environment variables. Paths stay as written (relative to the
working directory), so that a configuration means the same on every machine and its digest names it; a `~` is replaced.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from mpo_ray.config_serving import SET_FOR_VLLM, Precision, Serve, check_vllm_arguments
from mpo_ray.config_training import ConstrainedTraining, PolicyTraining, Share, Source, Strict, SupervisedTraining
from mpo_ray.home import PathText
from mpo_ray.records import Bound, check_weights, digest, is_reserved

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
NAMES = (
    "names are letters, digits, - and _, and not reference, uniform, mpo, mpo-token-level, soup-uniform or "
    "soup-mpo, and do not begin with fit-, mopo- or grid-"
)


class ConfigError(ValueError):
    """The run file, or a `--set`, is wrong. The message lists every problem with its place, value and remedy."""


#: A label as YAML reads it, a number or a truth value as well, as text.
LabelText = Annotated[str, BeforeValidator(lambda label: str(label) if isinstance(label, int | float) else label)]


class Objective(Strict):
    """One preference objective: its comparisons and the reward that scores it."""

    preferences: Source
    label: str | None = Field(None, description="label or rating column; the objective's name if absent")
    label_means: dict[LabelText, Literal["first", "second", "tie", "missing"]] | None = Field(
        None, description="label → the response it prefers, where the label column does not say it"
    )
    reward: PathText = Field(
        "implicit",
        description="`module:function` or `file.py:function`, a sequence classifier (directory or hub id), or "
        "`implicit`: β ℓ_k of the objective's own policy",
    )


class Data(Strict):
    heldout_share: Share = 0.1
    allow_bad_rows: Share = Field(0.0, description="share of rows of an objective, or a file, that may be refused")
    overlong: Literal["error", "drop"] = Field("error", description="what happens to rows longer than the context")
    max_prompt_tokens: PositiveInt = 512
    max_response_tokens: PositiveInt = 512
    cut_replies: Literal["unfinished", "finished"] = Field(
        "unfinished",
        description="what replies are whose rows say that they were cut at a limit: without an end token, or finished",
    )
    max_pairs: PositiveInt | None = Field(None, description="per objective, the first ones after a seeded shuffle")
    text: Literal["rendered", "plain"] = Field(
        "rendered",
        description="what prompts and responses that are texts, not messages, are: rendered already, so that special "
        "tokens in them count, or plain words",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="variables of the chat template, such as enable_thinking, wherever messages are rendered"
    )

    @property
    def rendering(self) -> dict[str, Any]:
        """What `Rendering` is told of the run."""
        return {"template_values": self.chat_template_kwargs, "text": self.text}


class Decoding(Strict):
    """How mixtures are decoded, by the decoded fit and the evaluation."""

    particles: PositiveInt = Field(
        1,
        description="1 decodes token by token, as the endpoint does unless a request says otherwise; N > 1 draws whole "
        "responses from π_λ by sequential Monte Carlo, in N times the time and memory (design 2.3)",
    )


class Embedded(Strict):
    """The project's own tiny world (data/embedded.py): sizes of what it makes."""

    num_texts: PositiveInt = 6000
    num_pairs: PositiveInt = 4000
    num_prompts: PositiveInt = 256
    hidden_size: PositiveInt = 64
    num_layers: PositiveInt = 2


class Reference(Strict):
    """π_ref: a model (directory or hub id) or `embedded`, a tiny Llama from scratch; `sft` trains it further."""

    model: PathText
    sft: SupervisedTraining | None = None


class Actors(Strict):
    """Ray Data actors that load the models once."""

    num_actors: PositiveInt = 1
    cpus_per_actor: PositiveFloat = 1.0
    gpus_per_actor: Annotated[float, Field(ge=0.0)] = 0.0
    batch_size: PositiveInt = Field(32, description="sequences per forward pass, and that are sampled at a time")
    prompts_per_part: PositiveInt = Field(32, description="prompts in one file: the unit of work, progress and resume")
    precision: Precision = "fp32"


class Scoring(Actors):
    """Actors of the stages that sample, score and evaluate, and of the decoded fit."""

    engine: Literal["mpo", "vllm"] = Field("mpo", description="what draws and scores: mpo, or vLLM where it can")
    vllm: dict[str, Any] = Field({}, description="further arguments of vLLM's EngineArgs, for engine: vllm")
    kv_cache_gib: PositiveFloat | None = Field(None, description="of an actor's KV cache; a share of memory if absent")

    @model_validator(mode="after")
    def _check(self) -> Scoring:
        check_vllm_arguments(self.engine, self.vllm, taken=SET_FOR_VLLM - {"max_model_len"})
        return self


class Samples(Strict):
    """Responses for the fit and its predictions: temperature 1, no truncation of the distribution."""

    prompts: Source | None = Field(
        None,
        description="the training comparisons' prompts if absent; given, they stay the same when an objective is added",
    )
    num_prompts: PositiveInt = 256
    proposals: Literal["reference", "policies", "all"] = Field(
        "all", description="who draws: π_ref (the paper's estimator), the K policies, or both (equation 6a)"
    )
    samples_per_prompt: Annotated[int, Field(ge=2)] = Field(
        4, description="m, from each proposal; with one response a prompt F is linear in λ and always runs to a vertex"
    )
    max_new_tokens: PositiveInt = 128


class MirrorSteps(Strict):
    """Equation (5): stochastic mirror descent on the table."""

    steps: PositiveInt = Field(2000, description="T")
    step_scale: PositiveFloat = Field(1.0, description="c of η = c/√T, 1/nats")
    prompts_per_step: PositiveInt | Literal["all"] = Field(
        1, description="1 is the paper's; more is a mini-batch; `all` is mirror descent on the whole table"
    )


class DecodedSteps(Strict):
    """Equation (6b): mirror descent on the gains of what is decoded with λ."""

    steps: PositiveInt = 10
    step_scale: PositiveFloat = Field(6.0, description="c of η_t = c/√t, per unit of win rate")
    gain: Literal["win_rate", "reward", "implicit"] = Field(
        "win_rate",
        description="against the reference: the win rate, the reward in its standard deviations, or ℓ_k in nats",
    )
    num_prompts: PositiveInt = Field(192, description="of the fit's prompts, in each step")
    completions_per_prompt: PositiveInt = 2


class Fit(Strict):
    """How λ is found. `exact` and `bsmd` minimise F on the score table, `decoded` plays the game that users see."""

    method: Literal["decoded", "exact", "bsmd", "fixed"] = "decoded"
    estimator: Literal["balanced", "paper"] = Field(
        "balanced", description="`paper` takes only the samples of π_ref; `balanced` all, by equation (6a)"
    )
    bsmd: MirrorSteps = MirrorSteps()
    decoded: DecodedSteps = DecodedSteps()
    weights: dict[str, float] | None = Field(None, description="λ for method `fixed`")
    bootstrap_draws: Annotated[int, Field(ge=0)] = Field(200, description="for the intervals of λ and F; 0 for none")
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    grid: PositiveInt = Field(10, description="steps along an edge of the simplex, for the predicted trade-off")

    @model_validator(mode="after")
    def _weights_go_with_fixed(self) -> Fit:
        if (self.weights is not None) != (self.method == "fixed"):
            raise ValueError(f"weights go with method `fixed` and only with it; method is {self.method!r}")
        return self


class MopoProblem(Strict):
    """One policy that maximises `primary` while the others stay above bounds (design 2.4, eq. 8)."""

    primary: str
    bounds: dict[str, float | str] = Field(
        {}, description="objective → win rate against the reference: 0.55, `reference - 0.02`, or `adaptive` (eq. 13)"
    )
    training: ConstrainedTraining | None = Field(None, description="`mopo.training` if absent")


class Mopo(Strict):
    """MOPO's policies. Their pool are the run's scored samples."""

    problems: Annotated[dict[str, MopoProblem], Field(min_length=1)]
    tau: PositiveFloat = Field(0.08, description="strength of the KL penalty, win probability per nat")
    radius: Annotated[float, Field(ge=0.0)] = Field(0.0, description="of the robust bounds, nats; 0 for none")
    variant: Literal["lagrangian", "barrier"] = "lagrangian"
    sigma: PositiveFloat = Field(0.01, description="strength of the barrier")
    candidates: Literal["reference", "all"] = Field(
        "all", description="whose samples make the pool: π_ref's, or every proposal's, weighed as in equation (6a)"
    )
    wins: Literal["rewards", "implicit", "labels"] = Field(
        "rewards",
        description="where win probabilities come from: the objectives' rewards, β ℓ of their policies, or the labels "
        "of pairs that all objectives judge; the pool are then these pairs' responses",
    )
    link: Literal["order", "bradley_terry"] = Field(
        "order", description="P(y ≻ y') from two rewards: who has the larger one, or σ of the difference"
    )
    heldout_share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.1, description="of the pool's prompts")
    training: ConstrainedTraining = ConstrainedTraining()

    def training_of(self, name: str) -> ConstrainedTraining:
        """How the policy of a problem is trained."""
        return self.problems[name].training or self.training

    @model_validator(mode="after")
    def _bounds_make_sense(self) -> Mopo:
        for name, problem in self.problems.items():
            for objective, text in problem.bounds.items():
                try:
                    bound = Bound.parse(objective, text)
                except ValueError as error:
                    raise ValueError(f"problems.{name}: {error}") from None
                if bound.adaptive and self.training_of(name).method != "online":
                    raise ValueError(
                        f"problems.{name}: the bound of {objective!r} is adaptive, and follows an online training; set "
                        "the training's method to online, or give a number"
                    )
        return self


class Judge(Strict):
    """A language model behind an OpenAI-compatible URL that compares completions with the reference's."""

    url: str = Field(description="base URL, such as http://127.0.0.1:8000/v1")
    model: str
    api_key_env: str | None = Field(None, description="environment variable that holds the key")
    template: PathText | None = Field(None, description="file with the prompt (Jinja); the project's own if absent")
    criteria: dict[str, str] = Field({}, description="objective → what the judge is told of it; its name if absent")
    num_prompts: PositiveInt = Field(64, description="of the evaluation's prompts; one completion of each is judged")
    max_tokens: PositiveInt = 256
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    concurrency: PositiveInt = 8
    retries: Annotated[int, Field(ge=0)] = 4
    timeout_s: PositiveFloat = 60.0
    price_per_million_input: Annotated[float, Field(ge=0.0)] = 0.0
    price_per_million_output: Annotated[float, Field(ge=0.0)] = 0.0
    cost_cap: PositiveFloat | None = Field(None, description="stop before this is exceeded; unit of the prices")


class Evaluation(Strict):
    prompts: Source | None = Field(None, description="the held-out comparisons' prompts if absent")
    num_prompts: PositiveInt = 256
    completions_per_prompt: PositiveInt = 1
    max_new_tokens: PositiveInt = 128
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    bootstrap_draws: PositiveInt = 1000
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    soups: bool = Field(True, description="Rewarded Soups: averages of the parameters, uniform and at the fitted λ")
    fits: bool = Field(False, description="the mixtures of the fits that were not chosen, beside the chosen one's")
    mixtures: dict[str, dict[str, float]] = Field({}, description="name → λ: further mixtures to compare")
    models: dict[str, PathText] = Field({}, description="name → directory or hub id: other people's models to compare")
    grid: PositiveInt | None = Field(None, description="steps along an edge of the simplex, for the decoded front")
    grid_prompts: PositiveInt = Field(64, description="prompts for each point of the grid")
    judge: Judge | None = None


class RunConfig(Strict):
    """A whole run file."""

    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    storage: PathText = Field("runs", description="directory or fsspec URL that holds the run directory")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    reference: Reference
    objectives: Annotated[dict[str, Objective], Field(min_length=1)]
    data: Data = Data()
    policies: PolicyTraining = PolicyTraining()
    embedded: Embedded = Embedded()
    scoring: Scoring = Scoring()
    decoding: Decoding = Decoding()
    samples: Samples = Samples()
    fit: Fit = Fit()
    mopo: Mopo | None = None
    evaluation: Evaluation = Evaluation()
    serve: Serve = Serve()

    @model_validator(mode="after")
    def _names_and_weights(self) -> RunConfig:
        for name in self.objectives:
            if not NAME.fullmatch(name) or is_reserved(name):
                raise ValueError(f"objective {name!r}: {NAMES}")
        if self.fit.weights is not None:
            check_weights(self.fit.weights, list(self.objectives), where="fit.weights")
        if self.mopo is not None:
            self._check_problems(self.mopo)
        for place in ("mixtures", "models"):
            for name in getattr(self.evaluation, place):
                if not NAME.fullmatch(name) or is_reserved(name):
                    raise ValueError(f"evaluation.{place}: {name!r}: {NAMES}")
                if name in self.objectives or (place == "models" and name in self.evaluation.mixtures):
                    raise ValueError(
                        f"evaluation.{place}: {name!r} already names another candidate; every candidate needs a name "
                        "of its own"
                    )
        if self.decoding.particles > 1 and self.evaluation.temperature != 1.0:
            raise ValueError(
                f"evaluation.temperature is {self.evaluation.temperature:g}, and the {self.decoding.particles} "
                "decoding.particles draw from π_λ, which has the temperature 1; set it to 1, or decoding.particles to 1"
            )
        for name, weights in self.evaluation.mixtures.items():
            check_weights(weights, list(self.objectives), where=f"evaluation.mixtures.{name}")
        return self

    def _check_problems(self, mopo: Mopo) -> None:
        for name, problem in mopo.problems.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"mopo.problems: {name!r}: names are letters, digits, - and _")
            for objective in (problem.primary, *problem.bounds):
                if objective not in self.objectives:
                    raise ValueError(
                        f"mopo.problems.{name}: unknown objective {objective!r}; the objectives are "
                        f"{', '.join(self.objectives)}"
                    )
            if problem.primary in problem.bounds:
                raise ValueError(
                    f"mopo.problems.{name}: the primary objective {problem.primary!r} is maximised, and cannot be "
                    "bounded as well"
                )
        if mopo.wins != "labels" and mopo.candidates == "reference" and self.samples.proposals == "policies":
            raise ValueError(
                "mopo.candidates is reference, and samples.proposals is policies: π_ref draws no candidates; set "
                "samples.proposals to all, or mopo.candidates to all"
            )

    def as_json(self) -> dict[str, Any]:
        """The whole configuration with its defaults, as JSON values."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """Names the content: two configurations have the same digest exactly if they say the same."""
        return digest(self.as_json())
