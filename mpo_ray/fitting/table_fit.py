"""A fit on a score table, with everything that says how far to believe it: what fit.json holds (docs/design.md 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mpo_ray.config import Fit
from mpo_ray.data.scores import ScoreTable
from mpo_ray.maths.exact_fit import solve
from mpo_ray.maths.fit_uncertainty import bootstrap_fit, jackknife_bias
from mpo_ray.maths.mirror_descent import MirrorDescent, batch_stochastic_mirror_descent, mirror_descent, trace
from mpo_ray.maths.partition import effective_sample_size, expectation, gap, gradient, objective
from mpo_ray.maths.sample_table import SampleTable
from mpo_ray.maths.simplex import Array, uniform
from mpo_ray.records import check_weights

Estimator = Literal["paper", "balanced"]

#: Points of a trace that are kept.
TRACE_POINTS = 60
#: How far above the smallest normalised reward an objective still binds: nats, or a share of rewards below 1 nat.
BINDS = 1e-6
MPO, UNIFORM, REFERENCE = "mpo", "uniform", "reference"


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Weights (K,) and how they came about; `trace` as fit.json has it, None where nothing was iterated."""

    weights: Array
    trace: dict[str, Any] | None = None


def fit_table(
    scores: ScoreTable, settings: Fit, *, seed: int, method: str, estimator: Estimator, beta: float | None = None
) -> dict[str, Any]:
    """Find λ on a score table by `method` (exact, bsmd or fixed) and describe it: one entry of fit.json.

    Raises ScoreTableError for a table that cannot be fitted, ValueError for given weights that are none.
    """
    table, names = scores.samples(estimator), list(scores.objectives)
    found = find_weights(table, names, settings, seed=seed, method=method)
    return describe(scores, found, settings, seed=seed, method=method, estimator=estimator, beta=beta)


def find_weights(table: SampleTable, names: Sequence[str], settings: Fit, *, seed: int, method: str) -> Found:
    """λ by one of the methods on the table."""
    if method == "fixed":
        return Found(np.array(list(check_weights(settings.weights or {}, names, where="fit.weights").values())))
    if method == "exact":
        fitted = solve(table)
        return Found(fitted.weights[0], _trace(table, np.arange(1, len(fitted.trace) + 1), fitted.trace))
    steps = settings.bsmd
    if steps.prompts_per_step == "all":
        descent = mirror_descent(table, step_scale=steps.step_scale, num_steps=steps.steps)
    else:
        descent = batch_stochastic_mirror_descent(
            table,
            step_scale=steps.step_scale,
            num_steps=steps.steps,
            prompts_per_step=steps.prompts_per_step,
            rng=np.random.default_rng(seed),
        )
    return Found(descent.average, _descent_trace(table, descent))


def describe(
    scores: ScoreTable,
    found: Found,
    settings: Fit,
    *,
    seed: int,
    method: str,
    estimator: Estimator,
    beta: float | None = None,
) -> dict[str, Any]:
    """What the table says of weights, whoever found them: certificate, intervals, balance, gains, leave-one-out."""
    table, names, weights = scores.samples(estimator), list(scores.objectives), found.weights
    slope = gradient(table, weights)
    sizes = effective_sample_size(table, weights)
    points = {MPO: weights, UNIFORM: uniform(len(names)), REFERENCE: np.zeros(len(names))}
    points |= dict(zip(names, np.eye(len(names)), strict=True))
    balance = {name: expectation(table, point, table.log_ratios).mean(axis=0) for name, point in points.items()}
    certificate = gap(slope, weights)
    return {
        "method": method,
        "estimator": estimator,
        "objectives": names,
        "weights": named(names, weights),
        "beta": beta,
        "num_prompts": table.num_prompts,
        "num_samples": len(table.log_ratios),
        "samples_per_prompt": {"min": int(table.num_responses.min()), "max": int(table.num_responses.max())},
        "proposals": scores.proposal_rows() if estimator == "balanced" else {REFERENCE: len(table.log_ratios)},
        "objective_value": objective(table, weights),
        "gradient": named(names, slope),
        "gap": certificate,
        "intervals": _intervals(table, names, weights, settings, seed) if method in ("exact", "bsmd") else None,
        "jackknife_bias": jackknife_bias(table, weights),
        "effective_sample_size": {"min": float(sizes.min()), "median": float(np.median(sizes))},
        "balance": {name: named(names, values) for name, values in balance.items()},
        "gains": named(names, balance[MPO] - balance[REFERENCE]),
        "binding": [
            name
            for name, value in zip(names, slope, strict=True)
            if value - slope.min() <= BINDS * min(1.0, float(np.abs(slope).max())) + certificate
        ],
        "leave_one_out": leave_one_out(table, names),
        "trace": found.trace,
        "decoded": None,
        "warnings": [],
    }


def _intervals(
    table: SampleTable, names: Sequence[str], weights: Array, settings: Fit, seed: int
) -> dict[str, Any] | None:
    """Of the table's optimum, which is what both methods estimate."""
    if not settings.bootstrap_draws or table.num_prompts < 2:
        return None
    bounds = bootstrap_fit(
        table,
        weights,
        draws=settings.bootstrap_draws,
        confidence=settings.confidence,
        rng=np.random.default_rng(seed),
    )
    return {
        "confidence": settings.confidence,
        "draws": settings.bootstrap_draws,
        "weights": named(names, bounds.weights),
        "objective_value": bounds.objective.tolist(),
    }


def leave_one_out(table: SampleTable, names: Sequence[str]) -> dict[str, Any]:
    """The exact fit without each objective in turn, on the same samples: the paper's ablation.

    `gains` are of all objectives, E_{π_λ}[ℓ_k] − E_{π_ref}[ℓ_k], so that what the one left out loses is seen.
    """
    if len(names) < 3:
        return {}
    result = {}
    at_reference = expectation(table, np.zeros(len(names)), table.log_ratios).mean(axis=0)
    for index, name in enumerate(names):
        kept = [k for k in range(len(names)) if k != index]
        fitted = solve(SampleTable(table.log_ratios[:, kept], table.log_proposal, table.starts))
        weights = np.zeros(len(names))
        weights[kept] = fitted.weights[0]
        gains = expectation(table, weights, table.log_ratios).mean(axis=0) - at_reference
        result[name] = {
            "weights": named(names, weights),
            "objective_value": float(fitted.objective[0]),
            "gains": named(names, gains),
        }
    return result


def _descent_trace(table: SampleTable, descent: MirrorDescent) -> dict[str, Any]:
    steps = np.unique(np.geomspace(1, len(descent.iterates) - 1, TRACE_POINTS).astype(np.int64))
    shown = _trace(table, steps, descent.running_averages(steps))
    return {**shown, "iterates": descent.iterates[steps - 1].tolist(), "step_size": descent.step_size}


def _trace(table: SampleTable, steps: Any, weights: Array) -> dict[str, Any]:
    seen = trace(table, steps, weights)
    return {
        "steps": seen.steps.tolist(),
        "weights": seen.weights.tolist(),
        "objective_value": seen.objective.tolist(),
        "gap": seen.gap.tolist(),
    }


def named(names: Sequence[str], values: Any) -> Mapping[str, Any]:
    return dict(zip(names, np.asarray(values).tolist(), strict=True))
