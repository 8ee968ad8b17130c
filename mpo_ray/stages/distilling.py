"""One policy in the place of the mixture: trained on the mixture's own token distributions, and measured against them.

It is the token-level mixture q that is learned. Its completions are drawn token by token, or whole from π_λ where that
is asked for: then the places that count are those where π_λ goes, and what is learned there is still q_t (design 2.3).
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from mpo_ray.cluster.generate import prompt_rows
from mpo_ray.data.prompts import PlacedPrompt, is_heldout
from mpo_ray.data.sources import DataError
from mpo_ray.decoding.offline import Recipe, complete, lanes_for, row_seed
from mpo_ray.decoding.open_engine import engine_of, open_mixture
from mpo_ray.evaluation.divergence import divergences
from mpo_ray.maths.statistics import bootstrap_means, interval
from mpo_ray.policies.artefact import policy_path, reference_path
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.policies.loading import ModelError, is_adapter, load_model, load_tokenizer
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.policies.plain_model import LABEL, check_new, write_card, written_whole
from mpo_ray.policies.soup import load_soup, soup_factors
from mpo_ray.records import decode_prompt, prompt_id
from mpo_ray.run import Run
from mpo_ray.training.distillation import distillation_loss
from mpo_ray.training.local_engine import LocalEngine
from mpo_ray.training.loop import train
from mpo_ray.training.pace import Pace
from mpo_ray.training.sft import Example

DISTILLED = (
    "One policy trained on the token-level mixture's next-token distributions. It is near the mixture "
    "Π_k π_k^λ_k and not equal to it: distillation.json says how far away it is on held-out prompts. Other weights "
    "need another policy."
)
RECORD = "distillation.json"
BOOTSTRAP_DRAWS, CONFIDENCE = 1000, 0.95
#: Loss is kept as its mean over as many steps.
LOG_EVERY = 10

#: What to show: the name of the work, how much of how much is done, figures.
Show = Callable[[str, int, int, Mapping[str, float]], None]


@dataclass(frozen=True, slots=True)
class Schooling:
    """How a student is trained.

    rank: of its LoRA adapter, where the policies are adapters; None for the sum of theirs
    """

    steps: int = 200
    batch_size: int = 16
    micro_batch_size: int = 8
    learning_rate: float = 2e-4
    rank: int | None = None
    completions_per_prompt: int = 4
    max_num_seqs: int = 16

    def check(self) -> None:
        """Raises ValueError for what cannot be, by the names of the command line."""
        for name, value in asdict(self).items():
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} {value:g}: it is above 0.")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"--batch-size {self.batch_size} is not a multiple of --micro-batch-size {self.micro_batch_size}."
            )


def run_prompts(run: Run) -> tuple[list[PlacedPrompt], list[PlacedPrompt]]:
    """A run's prompts: the fit's to train on, and the evaluation's, which are held out."""
    found = []
    for use in ("fit", "evaluation"):
        rows = run.read_table(f"prompts/{use}", ["prompt", "is_chat"]).to_pylist()
        prompts = (decode_prompt(row["prompt"], row["is_chat"]) for row in rows)
        found.append([PlacedPrompt(f"prompts/{use} row {n}", prompt) for n, prompt in enumerate(prompts, 1)])
    held = {prompt_id(placed.prompt) for placed in found[1]}
    return [placed for placed in found[0] if prompt_id(placed.prompt) not in held], found[1]


def split_prompts(
    prompts: Sequence[PlacedPrompt], *, share: float, seed: int
) -> tuple[list[PlacedPrompt], list[PlacedPrompt]]:
    """A file's prompts, each once: those to train on, and those held out."""
    sides: tuple[list[PlacedPrompt], list[PlacedPrompt]] = ([], [])
    for name, placed in {prompt_id(placed.prompt): placed for placed in prompts}.items():
        sides[is_heldout(name, share=share, seed=seed)].append(placed)
    return sides


def distil(
    artefact: str,
    out: Path,
    prompts: tuple[Sequence[PlacedPrompt], Sequence[PlacedPrompt]],
    recipe: Recipe,
    schooling: Schooling,
    *,
    seed: int,
    show: Show,
) -> dict[str, Any]:
    """Train a student of the mixture and write it to `out` with what is known of it; returns that.

    prompts: to train on, and held out
    The student is a LoRA adapter of the reference where all policies are adapters, else has all weights. It starts as
    the average of the policies' parameters. What remains is measured of the reference, before training, and after it.
    Raises ValueError for prompts and settings that cannot be, before a model is opened.
    """
    schooling.check()
    check_new(out)
    trained, held = prompts
    if len(trained) < 1 or len(held) < 2:
        raise DataError(
            f"{len(trained)} prompts to train on and {len(held)} held out: the first need 1, the second 2. Bring more "
            "prompts, or change --heldout-share."
        )
    rows, context = prompt_rows(artefact, [*trained, *held], recipe)
    mixture = open_mixture(artefact, weights=recipe.weights)
    times = [schooling.completions_per_prompt] * len(trained) + [1] * len(held)
    texts = _completions(mixture, artefact, rows, times, recipe, context, schooling.max_num_seqs, seed, show)
    lessons, exam = texts[: -len(held)], texts[-len(held) :]

    pad_id = load_tokenizer(artefact).pad_token_id
    how = {"batch_size": schooling.micro_batch_size, "pad_id": pad_id, "seed": seed}
    with _reference(mixture, artefact) as reference:
        measured = {"reference": remaining_kl(mixture, reference, exam, **how)}
    del reference  # it may be a model that nothing else holds
    student = _student(mixture, artefact, schooling, seed=seed)
    measured["before"] = remaining_kl(mixture, student, exam, **how)
    history = _train(mixture, student, lessons, schooling, pad_id=pad_id, seed=seed, show=show)
    measured["after"] = remaining_kl(mixture, student.eval(), exam, **how)
    adapted = _is_adapted(mixture, artefact)
    record = {
        "is": DISTILLED,
        "kind": "adapter" if adapted else "full weights",
        "weights": dict(recipe.weights),
        **measured,
        "confidence": CONFIDENCE,
        "heldout_prompts": len(held),
        "training_prompts": len(trained),
        "training_completions": len(lessons),
        "drawn": recipe.as_json()["mode"],
        "max_tokens": recipe.sampling.max_tokens,
        "seed": seed,
        **asdict(schooling),
        "rank": student.peft_config["default"].r if adapted else None,
        "history": history,
    }
    _write(student, artefact, out, record)
    return record


def remaining_kl(
    teacher: Any, student: Any, texts: Sequence[Example], *, batch_size: int, pad_id: int, seed: int
) -> dict[str, Any]:
    """KL(q ‖ student) along completions of q, one for each held-out prompt, with intervals over the prompts.

    `per_token`: Σ KL / Σ tokens, nats; `per_completion`: mean of Σ_t KL(q_t ‖ student_t), nats, which estimates the KL
    between whole responses without bias where they are drawn token by token.
    """
    sequences = [(text.prompt_ids, text.response_ids) for text in texts]
    sums, _ = divergences(teacher, student, sequences, batch_size=batch_size, pad_id=pad_id)
    values = np.array([sums, [len(completion) for _, completion in sequences]]).T
    draws = bootstrap_means(values, BOOTSTRAP_DRAWS, np.random.default_rng(seed))
    mean = values.mean(axis=0)
    found = {"per_token": (mean[0] / mean[1], draws[:, 0] / draws[:, 1]), "per_completion": (mean[0], draws[:, 0])}
    return {name: [float(value), *interval(drawn, CONFIDENCE)] for name, (value, drawn) in found.items()}


def _completions(
    mixture: MixtureForCausalLM,
    artefact: str,
    rows: Sequence[Mapping[str, Any]],
    times: Sequence[int],
    recipe: Recipe,
    context: int,
    max_num_seqs: int,
    seed: int,
    show: Show,
) -> list[Example]:
    """Completions of every prompt, as often as `times` says."""
    lanes = lanes_for(recipe, max_num_seqs)
    engine = engine_of(mixture, load_tokenizer(artefact), max_num_seqs=lanes, context=context)
    wanted = [(row, sample) for row, num in zip(rows, times, strict=True) for sample in range(num)]
    requests = [
        recipe.request(f"{row['row']}/{sample}", row["prompt_ids"], seed=row_seed(seed, row["row"], sample))
        for row, sample in wanted
    ]
    finished = complete(engine, requests, show=lambda done, total: show("completions", done, total, {}))
    if error := next((one.error for one in finished if one.error is not None), None):
        raise ValueError(error)
    return [Example(row["prompt_ids"], one.tokens) for (row, _), one in zip(wanted, finished, strict=True)]


@contextmanager
def _reference(mixture: MixtureForCausalLM, artefact: str) -> Iterator[Any]:
    """The base of the mixture's adapters, or where it has none a model that is opened for the while."""
    if mixture.has_reference:
        with mixture.running(len(mixture.objectives)) as model:
            yield model
    else:
        yield load_model(reference_path(Path(artefact).absolute(), mixture.config)).to(mixture.device)


def _student(mixture: MixtureForCausalLM, artefact: str, schooling: Schooling, *, seed: int) -> Any:
    """The soup at the mixture's weights, which is near it already: as an adapter, or all weights, on its device."""
    directory, weights = Path(artefact).absolute(), mixture.config.weights
    reference = reference_path(directory, mixture.config)
    policies = {name: str(policy_path(directory, name)) for name in mixture.objectives}
    if not _is_adapted(mixture, artefact):
        try:
            student: Any = load_soup(reference, policies, weights)
        except ModelError:  # policies of different shapes
            student = load_model(reference)
        return student.to(mixture.device)
    factors = soup_factors(policies, weights, rank=schooling.rank)
    rank = schooling.rank or max(len(a) for a, _ in factors.values())
    torch.manual_seed(seed)
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(factors), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        precision = "bf16" if mixture.dtype == torch.bfloat16 else "fp32"
        student = get_peft_model(load_model(reference, precision=precision), lora)
    with torch.no_grad():
        for layer, (a, b) in factors.items():
            module = student.get_base_model().get_submodule(layer)
            module.lora_A["default"].weight[: len(a)] = a
            module.lora_B["default"].weight[:, : len(a)] = b
    return student.to(mixture.device)


def _is_adapted(mixture: MixtureForCausalLM, artefact: str) -> bool:
    return all(is_adapter(policy_path(Path(artefact), name)) for name in mixture.objectives)


def _train(
    mixture: MixtureForCausalLM,
    student: Any,
    lessons: Sequence[Example],
    schooling: Schooling,
    *,
    pad_id: int,
    seed: int,
    show: Show,
) -> list[dict[str, float]]:
    """Minimise the loss; returns its mean over every few steps."""
    model = CompletionModel(student)
    accumulation = schooling.batch_size // schooling.micro_batch_size
    engine = LocalEngine(
        model, learning_rate=schooling.learning_rate, total_steps=schooling.steps, accumulation=accumulation
    )

    def loss_of(examples: np.ndarray) -> torch.Tensor:
        chosen = [lessons[i] for i in examples]
        return distillation_loss(model, mixture, chosen, pad_id=pad_id, device=engine.device)

    lengths = np.array([lesson.num_tokens for lesson in lessons])
    tokens = schooling.batch_size * float(lengths.mean())
    pace = Pace(start=0, total=schooling.steps, tokens_per_step=tokens, now=time.monotonic())
    history: list[dict[str, float]] = []
    losses: list[float] = []
    for step, loss in train(
        engine,
        loss_of,
        lengths=lengths,
        units=np.array([len(lesson.response_ids) for lesson in lessons]),
        name_of=lambda i: f"completion {i + 1} of {len(lessons)}",
        batch_size=schooling.batch_size,
        micro_batch_size=schooling.micro_batch_size,
        start_step=0,
        total_steps=schooling.steps,
        seed=seed,
    ):
        losses.append(loss)
        figures = {"loss": float(np.mean(losses))}
        show("distillation", step, schooling.steps, {**figures, **pace.after(step, time.monotonic())})
        if step % LOG_EVERY == 0 or step == schooling.steps:
            history.append({"step": step, **figures})
            losses.clear()
    return history


def _write(student: Any, artefact: str, out: Path, record: dict[str, Any]) -> None:
    with written_whole(out) as directory:
        if record["kind"] == "full weights":
            setattr(student.config, LABEL, {"kind": "distilled", "weights": record["weights"], "is": DISTILLED})
            student.generation_config = GenerationConfig.from_pretrained(artefact)
        student.save_pretrained(directory)
        load_tokenizer(artefact).save_pretrained(directory)
        write_card(directory, "A policy distilled from a mixture", DISTILLED, record["weights"])
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (directory / RECORD).write_text(text, encoding="utf-8")
