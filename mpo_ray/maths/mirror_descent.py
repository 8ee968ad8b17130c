"""Batch stochastic mirror descent (BSMD): MPO's method of fitting the mixture's weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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


def batch_stochastic_mirror_descent(
    log_ratios: Array, *, step_scale: float, num_steps: int, rng: np.random.Generator
) -> MirrorDescent:
    """Minimise F(λ) = E_x log Z_λ(x) over the simplex by stochastic mirror steps   (design 2.2, eq. 5)

    At step t draw a prompt x_t (uniformly, with replacement) and take its m responses y_tj ∼ π_ref:

        w = softmax_j(Σ_k λ_k ℓ_k(x_t, y_tj)),   v̂_k = Σ_j w_j ℓ_k(x_t, y_tj),   λ_k ← λ_k exp(−η v̂_k)/norm,   η = c/√T

    from λ_1 = 1/K. The answer is the average of λ_1 … λ_T, the points whose gradients were taken (these are the ones
    that the O(1/√T) bound is about), not of λ_{T+1}. Its other error, O(1/m), is the bias of v̂, a ratio of means over m
    responses: more steps do not lessen it, and what they converge to is the minimum of `partition.objective` on the
    table, not of the exact F.

    log_ratios: (B, m, K) ℓ_k = log π_k(y|x) − log π_ref(y|x), nats, for m samples y ∼ π_ref(·|x) of B prompts
    step_scale: c, 1/nats
    num_steps: T
    Raises ValueError for a table that is not finite, or m = 1.
    """
    table = np.asarray(log_ratios, dtype=np.float64)
    _check(table, step_scale, num_steps)
    num_prompts, _, num_objectives = table.shape
    step_size = step_scale / np.sqrt(num_steps)
    iterates = np.empty((num_steps + 1, num_objectives))
    log_weights = np.log(uniform(num_objectives))
    iterates[0] = np.exp(log_weights)
    for step, prompt in enumerate(rng.integers(num_prompts, size=num_steps)):
        responses = table[prompt]
        tilt = responses @ iterates[step]
        tilted = np.exp(tilt - tilt.max())
        estimate = (tilted / tilted.sum()) @ responses
        log_weights = exponentiated_gradient_step(log_weights, estimate, step_size)
        iterates[step + 1] = np.exp(log_weights)
    return MirrorDescent(average=iterates[:-1].mean(axis=0), iterates=iterates, step_size=float(step_size))


def _check(table: Array, step_scale: float, num_steps: int) -> None:
    if table.ndim != 3 or 0 in table.shape:
        raise ValueError(
            f"the table of log-ratios has shape {table.shape}; it must be (prompts, responses per prompt, objectives), "
            "none of them 0."
        )
    if table.shape[1] == 1:
        raise ValueError(
            "the table has m = 1 response per prompt: the mean inside the logarithm is then a single term, F is linear "
            "in the weights and its minimum is always at a vertex, whatever the policies are. Sample at least 2 "
            "responses per prompt (`samples.samples_per_prompt`)."
        )
    if not np.isfinite(table).all():
        prompt, response, policy = np.argwhere(~np.isfinite(table))[0].tolist()
        raise ValueError(
            f"the log-ratio of prompt {prompt}, response {response}, objective {policy} is "
            f"{table[prompt, response, policy]}; every log-ratio must be finite. Score that response again, or leave "
            "its prompt out."
        )
    if num_steps < 1 or not 0 < step_scale < np.inf:
        raise ValueError(f"num_steps is {num_steps} and step_scale {step_scale}; both must be positive and finite.")
