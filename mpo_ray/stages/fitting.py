"""The stages between scores and evaluation: the weights, and the mixture artefact."""

from __future__ import annotations

from typing import Any

from mpo_ray.data.scores import scores_from_table
from mpo_ray.fitting.standalone import available_estimators, fit_scores
from mpo_ray.fitting.summary import fit_summary
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.stages.stage import Context, Stage


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
