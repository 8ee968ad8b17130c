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
#: Spread of ℓ, nats, from which on F is smoothed first; how much rougher each smoothing is than the one before; and the
#: gap that a smoothed F is solved to, in units of τ.
SMOOTH, ROUGH, STAGE = 300.0, 4.0, 1e-2


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


class FitError(ValueError):
    """The solver did not reach its tolerance; the message says what to do."""


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

    Where ℓ spreads over many nats, F is nearly piecewise linear, and Newton's steps are good only close to a kink.
    There F_τ(λ) = τ E_x log E_y w_λ(y)^(1/τ), whose kinks are rounded over τ nats, is solved first, with τ falling to 1
    (continuation).

    shares: (D, P) the weight of each prompt in each of D problems, rows sum to 1; one problem, 1/P each, if absent
    start: (K,) where to begin, in the inside of the simplex or not; uniform if absent
    tolerance: nats; a share of the largest |ℓ| where that is below 1 nat. It is never less than float64 can resolve
        (`least_gap`)
    max_passes: for each τ
    Raises FitError if max_passes do not do, ValueError for prompts with a single response and for log-ratios that are
    not finite.
    """
    check_responses(table)
    num_problems = 1 if shares is None else len(shares)
    first = uniform(table.num_objectives) if start is None else start
    size, spread = extent(table)
    limit = max(tolerance * min(1.0, size), least_gap(size, spread))
    state = _State(np.tile(first, (num_problems, 1)), [], 0)
    smoothing = [spread / ROUGH**i for i in range(1, 64) if spread / ROUGH**i > ROUGH] if spread > SMOOTH else []
    for tau in smoothing:
        state = _descend(table, shares, state, tau=tau, limit=max(limit, STAGE * tau), size=size, max_passes=max_passes)
    state = _descend(table, shares, state, tau=1.0, limit=limit, size=size, max_passes=max_passes)
    assert state.best is not None
    found = gaps(state.best.gradient, state.weights)
    if not (found <= limit).all():
        raise FitError(
            f"the exact fit has a gap of {found.max():.2e} nats after {state.passes} passes over the table (wanted "
            f"{limit:.0e}). Use `method: bsmd`, or look for log-ratios that are wrong: the largest is {size:.3g} nats."
        )
    best = state.best
    return ExactFit(state.weights, best.objective, best.gradient, found, state.passes, np.array(state.trace))


def extent(table: SampleTable) -> tuple[float, float]:
    """Largest |ℓ| of a table, and the largest spread of a log w_λ over the responses of one prompt, both in nats.

    log w_λ = Σ_k λ_k ℓ_k − log p̄/π_ref is convex in λ, so its spread is at most that at some vertex.

    Raises ValueError for log-ratios that are not finite.
    """
    size = spread = 0.0
    for prompts, rows in table.blocks():
        log_ratios = np.asarray(table.log_ratios[rows], dtype=np.float64)
        starts = table.starts[prompts] - rows.start
        bad = np.argwhere(~np.isfinite(log_ratios))
        if len(bad):
            row, k = bad[0]
            raise ValueError(
                f"the log-ratio of policy {k} in row {rows.start + row} is {log_ratios[row, k]}: a policy that gives a "
                "response no probability, or numbers that broke on the way. Leave the response out, or score it again."
            )
        tilts = log_ratios - np.asarray(table.log_proposal[rows], dtype=np.float64)[:, None]
        high, low = (ufunc.reduceat(tilts, starts, axis=0) for ufunc in (np.maximum, np.minimum))
        size, spread = max(size, float(np.abs(log_ratios).max())), max(spread, float((high - low).max()))
    return size, spread


def least_gap(size: float, spread: float) -> float:
    """The gap that float64 resolves, nats: a tilt is known to ε · size; E_{π_λ}[ℓ_k] moves `spread` times as much."""
    return float(32 * np.finfo(float).eps * size * max(1.0, spread))


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """Where the solver is: weights (D, K), the points of the first problem, passes, and the moments if F is known."""

    weights: Array
    trace: list[Array]
    passes: int
    best: Moments | None = None


def _descend(
    table: SampleTable, shares: Array | None, state: _State, *, tau: float, limit: float, size: float, max_passes: int
) -> _State:
    """Minimise F_τ until every problem's gap is at most `limit`, or for `max_passes` passes. size: the largest |ℓ|."""
    weights, trace = state.weights.copy(), list(state.trace)
    best = moments(table, weights, shares, smoothing=tau)
    scale = np.maximum(np.trace(best.hessian, axis1=1, axis2=2), 1e-300)
    damping = np.full(len(weights), 1e-10)
    trace.append(weights[0].copy())
    passes = 1
    while True:
        found = gaps(best.gradient, weights)
        left = np.flatnonzero(found > limit)
        if not left.size or passes >= max_passes:
            return _State(weights, trace, state.passes + passes, best)
        curvature = best.hessian[left] + (damping[left] * scale[left])[:, None, None] * np.eye(weights.shape[1])
        trial = _quadratic_minimum(best.gradient[left], curvature, weights[left])
        tried = moments(table, trial, None if shares is None else shares[left], smoothing=tau)
        passes += 1
        # Near the optimum F no longer resolves a descent; there a smaller gap decides.
        slack = 8 * np.finfo(float).eps * np.maximum(max(1.0, size), np.abs(best.objective[left]))
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
