"""What the samples say of any λ before anything is decoded: expectations under the sequence-level mixture π_λ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpo_ray.maths.partition import effective_sample_size, expectation, log_partition
from mpo_ray.maths.sample_table import SampleTable
from mpo_ray.maths.simplex import Array
from mpo_ray.maths.statistics import bootstrap_means, interval


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """Means over prompts under π_λ, with bootstrap intervals over prompts.

    values: (C, 3) value, low, high of each column; kl: (3,) KL(π_λ ‖ π_ref), nats
    effective_sample_size: median over prompts
    """

    values: Array
    kl: Array
    effective_sample_size: float


def predict(
    table: SampleTable,
    weights: Array,
    values: Array,
    *,
    draws: int,
    confidence: float,
    rng: np.random.Generator,
) -> list[Prediction]:
    """Estimate E_x E_{y ∼ π_λ}[v(x, y)] and KL(π_λ ‖ π_ref) at G points λ   (design 2.2, eq. 6a)

    E_{π_λ}[v] ≈ Σ_s w_s v_s / Σ_s w_s;   KL = E_{π_λ}[Σ_k λ_k ℓ_k] − log Z_λ

    weights: (G, K); values: (N, C), one row per response
    draws: bootstrap draws over prompts, the same ones for every λ and column; 0 for no intervals (NaN)
    Self-normalised: biased by O(1/n), towards what the proposals do where the effective sample size is small.
    """
    columns = []
    for point in weights:
        tilt = (table.log_ratios @ point)[:, None]
        means = expectation(table, point, np.hstack([values, tilt]))
        means[:, -1] -= log_partition(table, point)
        columns.append(means)
    stacked = np.hstack(columns)
    centre = stacked.mean(axis=0)
    bounds = np.full((stacked.shape[1], 2), np.nan)
    if draws:
        resampled = bootstrap_means(stacked, draws, rng)
        bounds = np.array([interval(column, confidence) for column in resampled.T])
    table_of = np.column_stack([centre, bounds]).reshape(len(weights), values.shape[1] + 1, 3)
    return [
        Prediction(found[:-1], found[-1], float(np.median(effective_sample_size(table, point))))
        for point, found in zip(weights, table_of, strict=True)
    ]


def win_values(rewards: Array, drawn_by_reference: NDArray[np.bool_], starts: NDArray[np.int64]) -> Array:
    """How often each response's reward beats one of π_ref's for the same prompt, ties counting half   (design 2.5)

    rewards: (N, K); drawn_by_reference: (N,) bool, the opponents; starts: (P + 1,) rows of each prompt
    Returns (N, K), in [0, 1]. A response is not its own opponent. Raises ValueError where a prompt has no opponent.
    """
    result = np.empty(rewards.shape)
    sizes = np.diff(starts)
    for size in np.unique(sizes):
        rows = starts[:-1][sizes == size][:, None] + np.arange(size)  # (P', n)
        opponent = drawn_by_reference[rows]
        others = opponent[:, None, :] & ~np.eye(size, dtype=bool)
        number = others.sum(axis=2)
        if (number == 0).any():
            raise ValueError(
                "a win rate against the reference needs responses that the reference drew, 2 of each prompt; "
                f"{int((number == 0).any(axis=1).sum())} prompts have fewer. Set samples.proposals to `all` or "
                "`reference`."
            )
        for k in range(rewards.shape[1]):
            own, other = rewards[rows, k][:, :, None], rewards[rows, k][:, None, :]
            wins = ((own > other) + 0.5 * (own == other)) * others
            result[rows, k] = wins.sum(axis=2) / number
    return result
