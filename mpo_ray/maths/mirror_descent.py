"""Mirror descent on the table: batch stochastic mirror descent (BSMD, MPO's method), in mini-batches, and in full."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpo_ray.maths.exact_fit import check_responses
from mpo_ray.maths.partition import gaps, gradient, gradients, objectives
from mpo_ray.maths.sample_table import SampleTable
from mpo_ray.maths.simplex import Array, exponentiated_gradient_step, uniform


@dataclass(frozen=True, slots=True, eq=False)
class MirrorDescent:
    """The course of one fit.

    average: (K,) the answer λ̄ = (1/T) Σ_{t=1..T} λ_t
    iterates: (T+1, K) λ_1 (uniform) … λ_{T+1}, one row per step and the last point
    step_size: η, 1/nats
    """

    average: Array
    iterates: Array
    step_size: float

    def running_averages(self, steps: NDArray[np.int64]) -> Array:
        """(S, K) what the answer would have been after each of these numbers of steps, from 1 to T."""
        return np.asarray(np.cumsum(self.iterates[:-1], axis=0)[steps - 1] / steps[:, None])


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The answer as it came about: steps (S,), weights (S, K), objective (S,) and gap (S,) on the table, in nats."""

    steps: NDArray[np.int64]
    weights: Array
    objective: Array
    gap: Array


def batch_stochastic_mirror_descent(
    table: SampleTable, *, step_scale: float, num_steps: int, rng: np.random.Generator, prompts_per_step: int = 1
) -> MirrorDescent:
    """Minimise F(λ) = E_x log Z_λ(x) over the simplex by stochastic mirror steps   (design 2.2, eq. 5)

    At step t draw a prompt x_t (uniformly, with replacement) and take its n responses y_tj:

        w = softmax_j(log w_λ(y_tj)),   v̂_k = Σ_j w_j ℓ_k(x_t, y_tj),   λ_k ← λ_k exp(−η v̂_k)/norm,   η = c/√T

    from λ_1 = 1/K. The answer is the average of λ_1 … λ_T, the points whose gradients were taken (these are the ones
    that the O(1/√T) bound is about), not of λ_{T+1}. Its other error, O(1/n), is the bias of v̂, a ratio of means over n
    responses: more steps do not lessen it, and what they converge to is the minimum of `partition.objective` on the
    table, not of the exact F. With samples of π_ref, log w_λ = Σ_k λ_k ℓ_k and this is the paper's method.

    step_scale: c, 1/nats; num_steps: T
    prompts_per_step: v̂ is the mean over so many prompts; 1 is the paper's
    Raises ValueError for a prompt with a single response (m = 1).
    """
    check_responses(table)
    _check(step_scale, num_steps)
    step_size = step_scale / np.sqrt(num_steps)
    iterates = np.empty((num_steps + 1, table.num_objectives))
    log_weights = np.log(uniform(table.num_objectives))
    iterates[0] = np.exp(log_weights)
    chosen = rng.integers(table.num_prompts, size=(num_steps, prompts_per_step))
    for step, prompts in enumerate(chosen):
        estimate = np.zeros(table.num_objectives)
        for prompt in prompts:
            rows = slice(table.starts[prompt], table.starts[prompt + 1])
            log_ratios = np.asarray(table.log_ratios[rows], dtype=np.float64)
            tilt = log_ratios @ iterates[step] - table.log_proposal[rows]
            tilted = np.exp(tilt - tilt.max())
            estimate += (tilted / tilted.sum()) @ log_ratios / prompts_per_step
        log_weights = exponentiated_gradient_step(log_weights, estimate, step_size)
        iterates[step + 1] = np.exp(log_weights)
    return MirrorDescent(average=iterates[:-1].mean(axis=0), iterates=iterates, step_size=float(step_size))


def mirror_descent(table: SampleTable, *, step_scale: float, num_steps: int) -> MirrorDescent:
    """`batch_stochastic_mirror_descent` with every prompt in every step: nothing is random   (design 2.2, eq. 5)

    Raises ValueError for a prompt with a single response (m = 1).
    """
    check_responses(table)
    _check(step_scale, num_steps)
    step_size = step_scale / np.sqrt(num_steps)
    iterates = np.empty((num_steps + 1, table.num_objectives))
    log_weights = np.log(uniform(table.num_objectives))
    iterates[0] = np.exp(log_weights)
    for step in range(num_steps):
        log_weights = exponentiated_gradient_step(log_weights, gradient(table, iterates[step]), step_size)
        iterates[step + 1] = np.exp(log_weights)
    return MirrorDescent(average=iterates[:-1].mean(axis=0), iterates=iterates, step_size=float(step_size))


def trace(table: SampleTable, steps: NDArray[np.int64], weights: Array) -> Trace:
    """F and the gap of the answer after each of these steps, on the whole table   (design 2.2, eqs. 3 and 6)

    steps: (S,); weights: (S, K)
    """
    return Trace(steps, weights, objectives(table, weights), gaps(gradients(table, weights), weights))


def _check(step_scale: float, num_steps: int) -> None:
    if num_steps < 1 or not 0 < step_scale < np.inf:
        raise ValueError(f"num_steps is {num_steps} and step_scale {step_scale}; both must be positive and finite.")
