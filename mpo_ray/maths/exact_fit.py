"""The weights of a table, solved to the optimum: Newton steps on F over the simplex, certified by the gap.

The problem has K unknowns however large the table is, so each step costs one pass over the table and the rest nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpo_ray.maths.partition import Moments, gaps, moments
from mpo_ray.maths.sample_table import SampleTable
from mpo_ray.maths.simplex import Array, uniform

#: Steps of the small quadratic problem's interior-point method; it ends earlier where it is exact to rounding.
QUADRATIC_STEPS = 60


@dataclass(frozen=True, slots=True, eq=False)
class ExactFit:
    """Optima of D problems on one table.

    weights: (D, K) λ*; objective: (D,) F(λ*), nats; gradient: (D, K); gap: (D,) nats, bounds F(λ*) − min F
    passes: how often the table was read; trace: (passes, K) the points of the first problem, in order
    """

    weights: Array
    objective: Array
    gradient: Array
    gap: Array
    passes: int
    trace: Array


class FitError(RuntimeError):
    """The solver did not reach its tolerance."""


def solve(
    table: SampleTable,
    *,
    shares: Array | None = None,
    start: Array | None = None,
    tolerance: float = 1e-9,
    max_passes: int = 200,
) -> ExactFit:
    """Minimise F(λ) = E_x log Z_λ(x) over the simplex to gap(λ) ≤ tolerance   (design 2.2, eqs. 3 and 6)

    Each step minimises the quadratic model of F, damped (Levenberg and Marquardt) where the last one did not descend:
    F is convex, and its Hessian, a mean of covariances, is singular where policies agree.

    shares: (D, P) the weight of each prompt in each of D problems, rows sum to 1; one problem, 1/P each, if absent
    start: (K,) where to begin, in the inside of the simplex or not; uniform if absent
    tolerance: nats; where F itself is so large that float64 cannot resolve it, 4 units in its last place
    Raises FitError if max_passes do not do, ValueError for prompts with a single response.
    """
    check_responses(table)
    num_problems = 1 if shares is None else len(shares)
    first = uniform(table.num_objectives) if start is None else start
    weights = np.tile(first, (num_problems, 1))
    best = moments(table, weights, shares)
    scale = np.maximum(np.trace(best.hessian, axis1=1, axis2=2), 1e-12)
    damping = np.full(num_problems, 1e-10)
    limit = np.maximum(tolerance, 4 * np.finfo(float).eps * np.abs(best.gradient).max(axis=1))
    trace, passes = [weights[0].copy()], 1
    while True:
        found = gaps(best.gradient, weights)
        left = np.flatnonzero(found > limit)
        if not left.size:
            return ExactFit(weights, best.objective, best.gradient, found, passes, np.array(trace))
        if passes >= max_passes:
            raise FitError(
                f"the exact fit has a gap of {found.max():.2e} nats after {passes} passes over the table (wanted "
                f"{tolerance:.0e}). Use `method: bsmd`, or look for log-ratios that are wrong: the largest is "
                f"{max(float(np.abs(table.log_ratios[rows]).max()) for _, rows in table.blocks()):.3g} nats."
            )
        curvature = best.hessian[left] + (damping[left] * scale[left])[:, None, None] * np.eye(weights.shape[1])
        trial = _quadratic_minimum(best.gradient[left], curvature, weights[left])
        tried = moments(table, trial, None if shares is None else shares[left])
        passes += 1
        # Near the optimum F no longer resolves a descent; there a smaller gap decides.
        slack = 8 * np.finfo(float).eps * np.maximum(1.0, np.abs(best.objective[left]))
        down = tried.objective <= best.objective[left] - slack
        better = down | (
            (tried.objective <= best.objective[left] + slack) & (gaps(tried.gradient, trial) < found[left])
        )
        taken, refused = left[better], left[~better]
        weights[taken] = trial[better]
        best = _replaced(best, taken, tried, better)
        damping[taken] = np.maximum(damping[taken] / 30, 1e-12)
        damping[refused] *= 30
        trace.append(weights[0].copy())


def check_responses(table: SampleTable) -> None:
    """Refuse m = 1. Raises ValueError."""
    single = np.flatnonzero(table.num_responses < 2)
    if single.size:
        raise ValueError(
            f"{single.size} of {table.num_prompts} prompts have m = 1 response (the first is prompt {single[0]}): the "
            "mean inside the logarithm is then a single term, F is linear in the weights and its minimum is always at "
            "a vertex, whatever the policies are. Sample at least 2 responses per prompt "
            "(`samples.samples_per_prompt`), or leave these prompts out."
        )


def _replaced(best: Moments, taken: Array, tried: Moments, better: Array) -> Moments:
    objective, gradient, hessian = best.objective.copy(), best.gradient.copy(), best.hessian.copy()
    objective[taken], gradient[taken], hessian[taken] = (
        tried.objective[better],
        tried.gradient[better],
        tried.hessian[better],
    )
    return Moments(objective, gradient, hessian)


def _quadratic_minimum(gradient: Array, hessian: Array, weights: Array) -> Array:
    """Minimise ⟨g, x − λ⟩ + ½ (x − λ)ᵀ H (x − λ) over the simplex, for D problems side by side.

    A primal-dual interior-point method with Mehrotra's predictor. (D, K), (D, K, K), (D, K) → (D, K); weights below
    1e-13 are 0.
    """
    num_problems, size = gradient.shape
    if size == 1:
        return np.ones_like(weights)
    scale = np.maximum(np.abs(hessian).max(axis=(1, 2)), np.ptp(gradient, axis=1)) + 1e-300
    curvature = hessian / scale[:, None, None]
    linear = (gradient - gradient.min(axis=1, keepdims=True)) / scale[:, None]
    linear = linear - np.einsum("dij,dj->di", curvature, weights)
    x, z = np.full((num_problems, size), 1.0 / size), np.ones((num_problems, size))
    nu = np.zeros(num_problems)
    for _ in range(QUADRATIC_STEPS):
        dual = np.einsum("dij,dj->di", curvature, x) + linear - nu[:, None] - z
        primal = x.sum(axis=1) - 1.0
        complementarity = (x * z).mean(axis=1)
        if max(complementarity.max(), np.abs(dual).max(), np.abs(primal).max()) < 1e-16:
            break
        system = np.zeros((num_problems, size + 1, size + 1))
        system[:, :size, :size] = curvature
        system[:, np.arange(size), np.arange(size)] += z / x
        system[:, :size, size], system[:, size, :size] = -1.0, 1.0

        def direction(product: Array) -> tuple[Array, Array, Array]:
            """The Newton step towards x z = `product`."""
            right = np.concatenate([-dual - z + product / x, -primal[:, None]], axis=1)  # noqa: B023
            step = np.linalg.solve(system, right[..., None])[..., 0]  # noqa: B023
            forward, multiplier = step[:, :size], step[:, size]
            return forward, (product - z * forward) / x - z, multiplier  # noqa: B023

        dx, dz, _ = direction(np.zeros_like(x))
        reached = ((x + _room(x, dx)[:, None] * dx) * (z + _room(z, dz)[:, None] * dz)).mean(axis=1)
        centre = (reached / complementarity) ** 3 * complementarity
        dx, dz, dnu = direction(centre[:, None] - dx * dz)
        along_x, along_z = 0.995 * _room(x, dx), 0.995 * _room(z, dz)
        x = np.maximum(x + along_x[:, None] * dx, 1e-300)
        z = np.maximum(z + along_z[:, None] * dz, 1e-300)
        nu = nu + along_z * dnu
    x = np.where(x < 1e-13, 0.0, x)
    return np.asarray(x / x.sum(axis=1, keepdims=True))


def _room(values: Array, step: Array) -> Array:
    """(D,) the largest share of a step, at most 1, that keeps every value at or above 0."""
    with np.errstate(divide="ignore"):
        limits = np.where(step < 0, -values / np.minimum(step, -1e-300), np.inf)
    return np.asarray(np.minimum(1.0, limits.min(axis=1)))
