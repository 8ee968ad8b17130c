"""How far a fit can be trusted: intervals over prompts, the bias of few samples, and how many samples would do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpo_ray.maths.exact_fit import solve
from mpo_ray.maths.partition import effective_sample_size, tilted_weights
from mpo_ray.maths.sample_table import SampleTable
from mpo_ray.maths.simplex import Array
from mpo_ray.maths.statistics import bootstrap_counts, interval

#: Effective samples per prompt (median) that an estimate of log Z or of an expectation under π_λ should rest on.
ENOUGH = 4.0
#: Prompts that a bootstrap resamples at most.
MOST_PROMPTS = 20_000
#: What a bootstrap draw is solved to, nats: far below the spread of the draws.
TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Intervals:
    """Percentile intervals of the exact fit over resampled prompts: weights (K, 2), objective (2,) in nats."""

    weights: Array
    objective: Array


def bootstrap_fit(
    table: SampleTable, start: Array, *, draws: int, confidence: float, rng: np.random.Generator
) -> Intervals:
    """Fit again on resampled prompts: the spread of λ* and F(λ*) that the choice of prompts alone explains.

    Each draw is solved to its own optimum (gap ≤ 1e-6 nats) from `start`, (K,), the fit on all prompts. Responses are
    not resampled, so the bias of few responses (`jackknife_bias`) is not in the intervals. Of a table of over
    MOST_PROMPTS, a random part of so many is resampled, and its deviations are scaled by √(part/all): errors fall like
    1/√P (the m-out-of-n bootstrap).
    """
    part, scale = table, 1.0
    centre = solve(table, start=start)
    if table.num_prompts > MOST_PROMPTS:
        part = table.of_prompts(np.sort(rng.choice(table.num_prompts, MOST_PROMPTS, replace=False)))
        scale = float(np.sqrt(MOST_PROMPTS / table.num_prompts))
    own = solve(part, start=start)
    found = []
    for counts in bootstrap_counts(part.num_prompts, draws, rng):
        fitted = solve(part, shares=counts / part.num_prompts, start=own.weights[0], tolerance=TOLERANCE)
        found.append(np.column_stack([fitted.weights, fitted.objective]))
    deviations = np.concatenate(found) - np.append(own.weights[0], own.objective)
    values = np.append(centre.weights[0], centre.objective) + scale * deviations
    values[:, :-1] = np.clip(values[:, :-1], 0.0, 1.0)
    bounds = np.array([interval(column, confidence) for column in values.T])
    return Intervals(bounds[:-1], bounds[-1])


def jackknife_bias(table: SampleTable, weights: Array) -> float:
    """Estimate the O(1/n) bias of F̂(λ), a mean of logarithms of means over n responses   (design 2.2)

    bias = E_x (n − 1) (mean_j log Ẑ_(−j) − log Ẑ),   log Ẑ_(−j) = log Ẑ + log(1 − w_j) + log n/(n − 1)

    weights: (K,) λ
    Returns nats, at most 0: F̂ is biased low. Where one response carries a prompt, w_j nears 1 and the estimate −∞: then
    n responses cannot tell the bias either, and the effective sample size says so.
    """
    numbers = np.repeat(table.num_responses, table.num_responses).astype(np.float64)
    left_out = np.log1p(-np.minimum(tilted_weights(table, weights), 1 - 1e-12)) + np.log(numbers / (numbers - 1))
    per_prompt = np.add.reduceat(left_out, table.starts[:-1]) / table.num_responses
    return float(np.mean((table.num_responses - 1) * per_prompt))


def responses_needed(table: SampleTable, weights: Array, *, wanted: float = ENOUGH) -> int:
    """How many responses per prompt would give a median effective sample size of `wanted` at λ.

    n = wanted / φ, φ = (E w)²/E w² the share of effective samples, its median over prompts. With few samples ESS/n
    overstates φ (it is at least 1/n), so where π_ref drew all responses φ is at most exp(−Var[Σ_k λ_k ℓ_k]), its value
    for a normal tilt. The balanced estimator's weights are bounded and need no such correction.

    weights: (K,) λ. Returns a number that may be astronomically large.
    """
    share = effective_sample_size(table, weights) / table.num_responses
    if not np.any(table.log_proposal):
        numbers = table.num_responses
        tilt = np.asarray(table.log_ratios @ weights, dtype=np.float64)
        mean = np.add.reduceat(tilt, table.starts[:-1]) / numbers
        deviation = np.square(tilt - np.repeat(mean, numbers))
        variance = np.add.reduceat(deviation, table.starts[:-1]) / np.maximum(numbers - 1, 1)
        share = np.minimum(share, np.exp(-np.minimum(variance, 600.0)))
    return max(2, int(np.ceil(wanted / float(np.median(share)))))
