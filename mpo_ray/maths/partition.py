"""The partition function Z_λ of the sequence-level mixture, its objective F and what a table of samples says of them.

One set of formulas serves both estimators: with w_λ(y) = Π_k π_k(y)^λ_k / p̄(y) = exp(Σ_k λ_k ℓ_k − log p̄/π_ref)
(design 2.2, eq. 6a), Ẑ_λ is the mean of w_λ over a prompt's samples. Where π_ref drew them all, p̄ = π_ref and this is
the paper's estimator; where the policies drew them, w_λ is at most the number of proposals whatever the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpo_ray.maths.sample_table import BLOCK_ROWS, SampleTable
from mpo_ray.maths.simplex import Array


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """F and its derivatives at D points: objective (D,), gradient (D, K), hessian (D, K, K), all in nats."""

    objective: Array
    gradient: Array
    hessian: Array


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """Consecutive prompts at D points. P, N: prompts and rows of the block."""

    prompts: slice
    rows: slice
    log_ratios: Array  # (N, K)
    log_partition: Array  # (P, D)
    tilted: Array  # (N, D), sums to 1 over each prompt
    starts: NDArray[np.int64]  # (P,) within the block
    owner: NDArray[np.int64]  # (N,) prompt of each row, within the block


def log_partition(table: SampleTable, weights: Array) -> Array:
    """Estimate log Z_λ(x) = log E_{y ∼ p̄} w_λ(y)   (design 2.2, eqs. 2 and 6a)

    weights: (K,) λ
    Returns (P,), nats. Ẑ is unbiased for every λ at once; its logarithm is biased low, by O(1/n) for n samples.
    """
    return np.concatenate([block.log_partition[:, 0] for block in _blocks(table, weights[None])])


def tilted_weights(table: SampleTable, weights: Array) -> Array:
    """Weigh each prompt's samples as samples of π_λ: w_λ(y_s) / Σ_s' w_λ(y_s')   (design 2.2, eqs. 5 and 6a)

    weights: (K,) λ
    Returns (N,); the rows of a prompt sum to 1. Self-normalised: what is averaged under them has bias O(1/n).
    """
    return np.concatenate([block.tilted[:, 0] for block in _blocks(table, weights[None])])


def expectation(table: SampleTable, weights: Array, values: NDArray[np.floating]) -> Array:
    """Estimate E_{y ∼ π_λ}[v(x, y)] for every prompt: Σ_s w_s v_s   (design 2.2, eq. 6a)

    weights: (K,) λ, all 0 for π_ref itself; values: (N, C) one row per response
    Returns (P, C).
    """
    found = [
        np.add.reduceat(block.tilted * values[block.rows], block.starts, axis=0)
        for block in _blocks(table, weights[None])
    ]
    return np.concatenate(found)


def objective(table: SampleTable, weights: Array) -> float:
    """Estimate F(λ) = E_x log Z_λ(x), which the fit minimises   (design 2.2, eq. 3)

    weights: (K,) λ. Returns nats; every prompt counts alike. Convex in λ. With samples of π_ref it is biased low like
    `log_partition`, so it may be above or below 0 at a vertex, where the exact F is 0.
    """
    return float(objectives(table, weights[None])[0])


def gradient(table: SampleTable, weights: Array) -> Array:
    """Estimate ∂F/∂λ_k = E_x E_{y ∼ π_λ}[ℓ_k(x, y)]   (design 2.2, eq. 4)

    weights: (K,) λ
    Returns (K,), nats: the exact gradient of `objective`, and an estimate of F's with bias O(1/n).
    """
    return np.asarray(gradients(table, weights[None])[0])


def objectives(table: SampleTable, weights: Array) -> Array:
    """`objective` at D points: weights (D, K) → (D,)."""
    total = sum(block.log_partition.sum(axis=0) for block in _blocks(table, weights))
    return np.asarray(total / table.num_prompts)


def gradients(table: SampleTable, weights: Array) -> Array:
    """`gradient` at D points: weights (D, K) → (D, K)."""
    total = sum(block.tilted.T @ block.log_ratios for block in _blocks(table, weights))
    return np.asarray(total / table.num_prompts)


def moments(table: SampleTable, weights: Array, shares: Array | None = None, *, smoothing: float = 1.0) -> Moments:
    """F, its gradient and its Hessian at D points in one pass over the table   (design 2.2, eqs. 3 and 4)

    ∂²F/∂λ_j∂λ_k = E_x Cov_{y ∼ π_λ}[ℓ_j, ℓ_k]

    weights: (D, K); shares: (D, P) the weight of each prompt at each point, rows sum to 1 (1/P each if absent)
    smoothing: τ; of more than 1 the same for F_τ(λ) = τ E_x log E_y w_λ(y)^(1/τ), in which kinks of F are rounded
    """
    (num_points, num_objectives), even = weights.shape, 1.0 / table.num_prompts
    upper = np.triu_indices(num_objectives)
    value = np.zeros(num_points)
    slope = np.zeros((num_points, num_objectives))
    squares = np.zeros((num_points, len(upper[0])))
    means = np.zeros((num_points, num_objectives, num_objectives))
    for block in _blocks(table, weights, smoothing):
        share = np.full((num_points, 1), even) if shares is None else shares[:, block.prompts]
        value += (share * block.log_partition.T).sum(axis=1)
        mean = _means(block)  # (D, P, K)
        slope += (share[..., None] * mean).sum(axis=1)
        # Covariances are of differences from a prompt's first response: ℓ may be large and its spread small.
        first = block.log_ratios[block.starts]
        mean, centred = mean - first, block.log_ratios - first[block.owner]
        means += np.matmul((share[..., None] * mean).transpose(0, 2, 1), mean)
        weighed = block.tilted * (even if shares is None else share.T[block.owner])
        squares += weighed.T @ (centred[:, upper[0]] * centred[:, upper[1]])
    hessian = np.empty_like(means)
    hessian[:, upper[0], upper[1]] = squares
    hessian[:, upper[1], upper[0]] = squares
    return Moments(smoothing * value, slope, (hessian - means) / smoothing)


def gap(gradient: Array, weights: Array) -> float:
    """Bound the distance to the optimum: gap(λ) = ⟨∇F, λ⟩ − min_k ∂F/∂λ_k ≥ F(λ) − F(λ*)   (design 2.2, eq. 6)

    gradient: (K,) ∇F(λ), nats
    weights: (K,) λ on the simplex
    Returns nats, never negative, 0 exactly at an optimum of the F that the gradient belongs to.
    """
    return float(gaps(gradient[None], weights[None])[0])


def gaps(gradients: Array, weights: Array) -> Array:
    """`gap` at D points: (D, K), (D, K) → (D,). Computed as Σ_k λ_k (g_k − min g), which does not cancel."""
    return np.asarray(((gradients - gradients.min(axis=1, keepdims=True)) * weights).sum(axis=1))


def effective_sample_size(table: SampleTable, weights: Array) -> Array:
    """Count how many of a prompt's n samples carry the estimate at λ: ESS = 1 / Σ_s w_s²   (design 2.2)

    weights: (K,) λ
    Returns (P,), between 1 (one sample decides) and n (all count alike).
    """
    found = [np.add.reduceat(np.square(block.tilted[:, 0]), block.starts) for block in _blocks(table, weights[None])]
    return np.asarray(1.0 / np.concatenate(found))


def _blocks(table: SampleTable, weights: Array, smoothing: float = 1.0) -> Iterator[_Block]:
    """Tilt the table block by block, so that what is computed on the way stays small beside it."""
    points = np.ascontiguousarray(weights.T, dtype=np.float64)
    for prompts, rows in table.blocks(max(BLOCK_ROWS // 16, BLOCK_ROWS // max(1, points.shape[1] // 4))):
        log_ratios = np.asarray(table.log_ratios[rows], dtype=np.float64)
        starts = table.starts[prompts] - rows.start
        owner = table.prompt_rows(prompts)
        tilt = log_ratios @ points - np.asarray(table.log_proposal[rows], dtype=np.float64)[:, None]
        if smoothing != 1.0:
            tilt /= smoothing
        largest = np.maximum.reduceat(tilt, starts, axis=0)
        tilted = np.exp(tilt - largest[owner])
        total = np.add.reduceat(tilted, starts, axis=0)
        tilted /= total[owner]
        number = np.log(table.num_responses[prompts])[:, None]
        yield _Block(prompts, rows, log_ratios, largest + np.log(total) - number, tilted, starts, owner)


def _means(block: _Block) -> Array:
    """(D, P, K) E_{π_λ}[ℓ_k] of every prompt and point."""
    num_prompts = len(block.starts)
    size, rest = divmod(len(block.log_ratios), num_prompts)
    if rest == 0 and np.array_equal(block.starts, np.arange(num_prompts) * size):
        rows = block.log_ratios.reshape(num_prompts, size, -1)
        tilted = block.tilted.reshape(num_prompts, size, -1)
        return np.asarray(np.matmul(tilted.transpose(0, 2, 1), rows).transpose(1, 0, 2))
    return np.stack([np.add.reduceat(w[:, None] * block.log_ratios, block.starts, axis=0) for w in block.tilted.T])
