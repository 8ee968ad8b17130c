"""The stages between scores and evaluation: the weights, and the mixture artefact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from mpo_ray.data.scores import read_log_ratios
from mpo_ray.maths import partition
from mpo_ray.maths.mirror_descent import batch_stochastic_mirror_descent
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.records import check_weights
from mpo_ray.stages.stage import Context, Stage

TRACE_POINTS = 400


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
