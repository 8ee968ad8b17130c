"""The stages between scores and evaluation: the weights, and the mixture artefact."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpo_ray.cluster.decoded_fit import play
from mpo_ray.data.scores import ScoreTable, scores_from_table
from mpo_ray.fitting.standalone import available_estimators, fit_scores, trade_off_of, usable_estimator
from mpo_ray.fitting.summary import fit_summary
from mpo_ray.fitting.table_fit import Found, describe, fit_table
from mpo_ray.fitting.trust import warnings
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.stages.stage import STAGES, Context, Stage, content


def fit(context: Context) -> dict[str, Any]:
    """Find λ by the config's method, describe it and what the other fits would say, and predict the trade-off."""
    config, names = context.config, list(context.config.objectives)
    scores = scores_from_table(context.run.read_table("scores"), names, min_objectives=1)
    seed, beta = config.seed, config.policies.beta
    if config.fit.method == "decoded" and len(names) > 1:
        result = _decoded(context, scores)
    else:  # one policy has the weight 1, and no game to play
        method = "exact" if config.fit.method == "decoded" else config.fit.method
        estimator = usable_estimator(scores, config.fit.estimator)
        result = fit_table(scores, config.fit, method=method, estimator=estimator, seed=seed, beta=beta)
    trade_off = trade_off_of(scores, result, config.fit, seed=config.seed)
    result["warnings"] = warnings(scores, result, trade_off)
    result["alternatives"] = {
        estimator: fit_scores(
            scores, config.fit.model_copy(update={"estimator": estimator}), method="exact", seed=seed, beta=beta
        )[0]
        for estimator in available_estimators(scores)
    }
    context.run.write_json("fit.json", result)
    context.run.write_json("trade_off.json", trade_off)
    context.console.print(fit_summary(result))
    weights: dict[str, float] = result["weights"]
    return weights


def _decoded(context: Context, scores: ScoreTable) -> dict[str, Any]:
    """Play the game of equation (6b), and describe its answer on the table as any other's."""
    config = context.config
    game = play(
        context.run,
        config.model_copy(update={"scoring": context.scoring()}),
        reference=context.reference(),
        policies=context.policies(),
        rewards=context.rewards(),
        inputs=context.inputs(STAGES["scores"]),
        console=context.console,
    )
    result = describe(
        scores,
        Found(np.array(list(game.weights.values()))),
        config.fit,
        seed=config.seed,
        method="decoded",
        estimator=usable_estimator(scores, config.fit.estimator),
        beta=config.policies.beta,
    )
    least, error = min(game.gains.values()), max(game.standard_errors.values())
    intervals = None
    if game.intervals is not None:
        draws, confidence = config.fit.bootstrap_draws, config.fit.confidence
        intervals = {"confidence": confidence, "draws": draws, "weights": game.intervals, "objective_value": None}
    return result | {
        "decoded": game.as_json(),
        "intervals": intervals,
        "binding": [name for name, gain in game.gains.items() if gain - least <= 2 * error],
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
            **context.config.data.rendering,
        )


FIT = Stage(
    name="fit",
    title="Mixture weights",
    after=("scores",),
    outputs=lambda context: ["fit.json", "trade_off.json"],
    depends_on=lambda context: [
        list(context.config.objectives),  # in their order: λ is a list from here on
        context.config.fit.model_dump(),
        context.config.decoding.model_dump(),
        {name: content(spec) for name, spec in context.rewards().items()},
        context.config.seed,
    ],
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
