"""The stages between policies and mixture: samples of the reference, their scores, and the weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpo_ray.cluster.parts import Part, process_parts
from mpo_ray.cluster.score import ReferenceSampler, SampleScorer
from mpo_ray.data.scores import scores_from_table
from mpo_ray.fitting.standalone import available_estimators, fit_scores
from mpo_ray.fitting.summary import fit_summary
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.records import digest
from mpo_ray.stages.stage import Context, Stage, content
from mpo_ray.stages.training import ACTOR_PLACEMENT


def sample(context: Context) -> dict[str, Any]:
    """Draw m responses per prompt of the fit from π_ref."""
    config = context.config
    context.run.begin("samples", context.inputs(SAMPLES))
    parts = [
        Part(source, f"samples/{source.rpartition('/')[2]}", {"seed": int(digest([config.seed, index])[:12], 16)})
        for index, source in enumerate(context.run.parts("prompts/fit"))
    ]
    process_parts(
        context.run,
        parts,
        ReferenceSampler,
        {
            "reference": context.reference(),
            "actors": config.scoring.model_dump(),
            "num_samples": config.samples.samples_per_prompt,
            "max_new_tokens": config.samples.max_new_tokens,
        },
        actors=config.scoring,
        console=context.console,
        title="samples of the reference",
    )
    finished = context.run.read_table("samples")["finished"].to_pylist()
    return {"samples": len(finished), "finished": float(np.mean(finished))}


def score(context: Context) -> None:
    """Log-ratios of every policy and rewards of every objective on the samples."""
    config = context.config
    context.run.begin("scores", context.inputs(SCORES))
    process_parts(
        context.run,
        [Part(source, f"scores/{source.rpartition('/')[2]}", {}) for source in context.run.parts("samples")],
        SampleScorer,
        {
            "reference": context.reference(),
            "policies": context.policies(),
            "rewards": context.rewards(),
            "beta": config.policies.beta,
            "actors": config.scoring.model_dump(),
        },
        actors=config.scoring,
        console=context.console,
        title="scores",
    )


def fit(context: Context) -> dict[str, Any]:
    """Find λ by the config's method, describe it and what the other fits would say, and predict the trade-off."""
    config, names = context.config, list(context.config.objectives)
    scores = scores_from_table(context.run.read_table("scores"), names, min_objectives=1)
    result, trade_off = fit_scores(
        scores, config.fit, seed=config.seed, method=config.fit.method, beta=config.policies.beta
    )
    alternatives = {}
    for estimator in available_estimators(scores):
        settings = config.fit.model_copy(update={"estimator": estimator})
        alternatives[estimator] = fit_scores(
            scores, settings, seed=config.seed, method="exact", beta=config.policies.beta
        )[0]
    result["alternatives"] = alternatives
    context.run.write_json("fit.json", result)
    context.run.write_json("trade_off.json", trade_off)
    context.console.print(fit_summary(result))
    weights: dict[str, float] = result["weights"]
    return weights


def write_mixture(context: Context) -> None:
    """Put policies, weights, tokenizer and fit into one directory that Hugging Face code loads."""
    result = context.run.read_json("fit.json")
    with context.run.publishing("mixture") as directory:
        write_artefact(
            directory,
            objectives={name: context.run.fetch(f"policies/{name}") for name in context.config.objectives},
            reference=context.reference(),
            copy_reference=bool(context.config.reference.sft),
            weights=result["weights"],
            fit=result,
            precision=context.config.policies.precision,
        )


SAMPLES = Stage(
    name="samples",
    title="Samples of the reference",
    after=("reference",),
    outputs=lambda context: ["samples"],
    depends_on=lambda context: [
        context.config.samples.model_dump(),
        context.config.scoring.model_dump(exclude=ACTOR_PLACEMENT),
        context.config.seed,
    ],
    work=sample,
)
SCORES = Stage(
    name="scores",
    title="Scores",
    after=("samples", "policies"),
    outputs=lambda context: ["scores"],
    depends_on=lambda context: [
        context.config.scoring.model_dump(exclude=ACTOR_PLACEMENT),
        {name: content(spec) for name, spec in context.rewards().items()},
    ],
    work=score,
)
FIT = Stage(
    name="fit",
    title="Mixture weights",
    after=("scores",),
    outputs=lambda context: ["fit.json", "trade_off.json"],
    depends_on=lambda context: [context.config.fit.model_dump(), context.config.seed],
    work=fit,
)
MIXTURE = Stage(
    name="mixture",
    title="Mixture artefact",
    after=("fit",),
    outputs=lambda context: ["mixture"],
    depends_on=lambda context: None,
    work=write_mixture,
)
