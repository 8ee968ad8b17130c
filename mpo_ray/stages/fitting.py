"""The stages between policies and mixture: samples of the reference, their scores, and the weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from mpo_ray.cluster.parts import Part, process_parts
from mpo_ray.cluster.score import ReferenceSampler, SampleScorer
from mpo_ray.data.scores import read_log_ratios
from mpo_ray.maths import partition
from mpo_ray.maths.mirror_descent import batch_stochastic_mirror_descent
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.records import check_weights, digest
from mpo_ray.stages.stage import Context, Stage, content
from mpo_ray.stages.training import ACTOR_PLACEMENT

TRACE_POINTS = 400


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
    """Fit λ on the score table by BSMD, or take the given one; both with what the table says of it."""
    result = fit_table(context, context.run.read_table("scores"))
    context.run.write_json("fit.json", result)
    shown = ", ".join(f"{name} {value:.3f}" for name, value in result["weights"].items())
    ess = result["effective_sample_size"]
    context.console.print(
        f"  weights: {shown}; effective sample size min {ess['min']:.1f}, median {ess['median']:.1f} of "
        f"{result['samples_per_prompt']}"
    )
    weights: dict[str, float] = result["weights"]
    return weights


def fit_table(context: Context, scores: pa.Table) -> dict[str, Any]:
    """What `fit.json` holds: weights, how they were found, F and its gradient on the table, effective sample size."""
    config, objectives = context.config.fit, list(context.config.objectives)
    log_ratios = read_log_ratios(scores, objectives)
    found: dict[str, Any] = {"trace": None}
    if config.weights is not None:
        weights = check_weights(config.weights, objectives, where="fit.weights")
    else:
        descent = batch_stochastic_mirror_descent(
            log_ratios,
            step_scale=config.bsmd.step_scale,
            num_steps=config.bsmd.steps,
            rng=np.random.default_rng(context.config.seed),
        )
        weights = dict(zip(objectives, descent.average.tolist(), strict=True))
        shown = np.unique(np.linspace(0, config.bsmd.steps, TRACE_POINTS).astype(int))
        found = {
            "steps": config.bsmd.steps,
            "step_size": descent.step_size,
            "trace": [[int(step), *descent.iterates[step].tolist()] for step in shown],
        }
    vector = np.array(list(weights.values()))
    gradient = partition.gradient(log_ratios, vector)
    ess = partition.effective_sample_size(log_ratios, vector)
    return {
        "method": config.method,
        "estimator": "samples of the reference",
        "objectives": objectives,
        "weights": weights,
        **found,
        "objective_value": partition.objective(log_ratios, vector),
        "gradient": dict(zip(objectives, gradient.tolist(), strict=True)),
        "gap": partition.gap(gradient, vector),
        "effective_sample_size": {"min": float(ess.min()), "median": float(np.median(ess))},
        "log_ratio_std": dict(zip(objectives, log_ratios.std(axis=(0, 1)).tolist(), strict=True)),
        "num_prompts": log_ratios.shape[0],
        "samples_per_prompt": log_ratios.shape[1],
        "beta": context.config.policies.beta,
    }


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
    outputs=lambda context: ["fit.json"],
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
