"""One policy, a primary objective, bounds on the others, solved on a finite pool of candidates (design 2.4).

The problem has as many unknowns as there are bounds, however large the pool is: its convex dual. Knows nothing of
models, and not where win probabilities come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpo_ray.maths.partition import effective_sample_size, log_partition, moments, tilted_weights
from mpo_ray.maths.pool import Pool
from mpo_ray.maths.robust import check_radius, robust_bound
from mpo_ray.maths.sample_table import SampleTable
from mpo_ray.maths.simplex import Array

#: Newton steps at most, and the residual of the optimality conditions at which they end, in units of win probability.
MAX_STEPS, TOLERANCE = 200, 1e-10
#: Rounds of the robust problem at most, and its residual.
MAX_ROUNDS, ROBUST_TOLERANCE = 2000, 1e-8
#: A multiplier beyond this has run away: a unit of the constraint would be worth that many units of the primary.
RUNAWAY = 1e4


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """The optimum of (8) on a pool, and its certificate.

    multipliers: (J,) λ ≥ 0; chi: (J,) χ of the robust bounds, ∞ without a radius
    ratio: (N,) ρ, which averages to 1 under π_ref for every prompt
    primary: E[ρ p̄]; secondary: (J,) E[ρ q̄]; robust: (J,) their robust bounds, the same without a radius
    kl: E_x KL(π‖π_ref), nats; dual_value: g(λ)
    residual: how far the conditions of optimality are from holding, in units of win probability
    effective_sample_size: (P,) candidates that carry ρ, per prompt
    """

    multipliers: Array
    chi: Array
    ratio: Array
    primary: float
    secondary: Array
    robust: Array
    kl: float
    dual_value: float
    residual: float
    effective_sample_size: Array


class RunawayError(ValueError):
    """A multiplier grew beyond all reason: the bound can hardly be met, or not at all.

    which: number of the bound; multiplier: how far it got; name: what the caller calls it
    """

    def __init__(self, which: int, multiplier: float, name: str | None = None) -> None:
        super().__init__(which, multiplier, name)
        self.which, self.multiplier, self.name = which, multiplier, name

    def __str__(self) -> str:
        return (
            f"bound {self.which if self.name is None else self.name}: its multiplier reached {self.multiplier:.0f}, so "
            "it can be met, if at all, only by a policy that leaves single candidates. Lower the bound or the radius, "
            "or add candidates to the pool."
        )


def ratio(pool: Pool, multipliers: Array, tau: float) -> Array:
    """ρ_λ(x, y) = exp((p̄ + λᵀq̄)/τ) / E_ref[exp((p̄ + λᵀq̄)/τ)]   (design 2.4, eq. 9)

    multipliers: (J,) λ. Returns (N,), which averages to 1 under π_ref for every prompt.
    """
    weights = np.concatenate([[1.0], multipliers])
    return np.asarray(tilted_weights(pool.tilted(tau), weights) / np.exp(pool.log_reference))


def dual(pool: Pool, multipliers: Array, bounds: Array, tau: float) -> tuple[float, Array]:
    """g(λ) = τ E_x log E_ref exp((p̄ + λᵀq̄)/τ) − λᵀb and ∂g/∂λ_j = E_ref[ρ q̄_j] − b_j   (design 2.4, eq. 10)"""
    found = _dual_moments(pool.tilted(tau), bounds, tau)(multipliers)
    return found[0], found[1]


def multiplier_step(multipliers: Array, values: Array, bounds: Array, step_size: float) -> Array:
    """λ ← [λ − η (G − b)]₊, the stochastic update   (design 2.4, eq. 10)

    values: (J,) an estimate of E_ref[ρ q̄_j], or of its robust bound; step_size: η, per unit of win probability
    """
    return np.maximum(multipliers - step_size * (values - bounds), 0.0)


def barrier_multipliers(values: Array, bounds: Array, sigma: float, delta: float) -> Array:
    """λ_j = σ/(G_j − b_j), of the logarithm that goes on linearly below δ: σ/max(G_j − b_j, δ)   (design 2.4)

    values: (J,) G; sigma: strength of the barrier; delta: slack below which a point counts as not yet feasible
    """
    return np.asarray(sigma / np.maximum(values - bounds, delta))


def barrier_step(
    multipliers: Array, values: Array, bounds: Array, step_size: float, *, sigma: float, delta: float
) -> Array:
    """λ ← argmin_{0 ≤ l ≤ σ/δ} (G − b) l − σ log l + (l − λ)²/2η: a step towards `barrier_multipliers`   (design 2.4)

    values: (J,) an estimate of G; step_size: η, per unit of win probability; sigma, delta: as in `barrier_multipliers`
    Its fixed point is λ = σ/max(G − b, δ). Unlike that formula it takes an estimate as noisy as `multiplier_step` does,
    whose step it is for σ → 0.
    """
    moved = multipliers - step_size * (values - bounds)
    return np.asarray(np.minimum((moved + np.sqrt(np.square(moved) + 4 * step_size * sigma)) / 2, sigma / delta))


def scheduled_bounds(values: Array, relaxation: float) -> Array:
    """b ← relaxation · G, with G of t0 steps ago   (design 2.4, eq. 13)"""
    return np.asarray(relaxation * values)


def solve_lagrangian(pool: Pool, bounds: Array, *, tau: float, radius: float = 0.0) -> Solution:
    """MOPO-Lag on a pool: minimise the dual over λ ≥ 0   (design 2.4, eqs. 8 to 10, and 12 with a radius)

    bounds: (J,) b_j. Feasible ones: `feasibility` decides that first, and this does not.
    Raises RunawayError where a multiplier passes RUNAWAY: the bounds are met, if at all, by a hair.
    """
    check_temperature(tau)
    check_radius(radius)
    if radius == 0 or pool.num_secondary == 0:
        table = pool.tilted(tau)
        multipliers = _minimise(_dual_moments(table, bounds, tau), np.zeros(pool.num_secondary))
        return _solution(pool, table, multipliers, bounds, tau, radius)
    return _solve_robust(pool, bounds, tau, radius)


def solve_barrier(
    pool: Pool, bounds: Array, *, tau: float, sigma: float, delta: float = 1e-3, radius: float = 0.0
) -> Solution:
    """MOPO-LB on a pool: maximise E[ρ p̄] − τ KL + σ Σ_j log(E[ρ q̄_j] − b_j)   (design 2.4)

    Its dual adds −σ Σ_j log λ_j to g, over 0 < λ_j ≤ σ/δ, where the logarithm that goes on linearly below δ ends.
    With a radius the expectations are the robust bounds. Raises as `solve_lagrangian`.
    """
    check_temperature(tau)
    check_radius(radius)
    for name, value in {"sigma": sigma, "delta": delta}.items():
        if not value > 0:
            raise ValueError(f"{name}: {value} is not above 0; it is in units of win probability, such as 0.01.")
    if radius > 0 and pool.num_secondary:
        return _solve_robust(pool, bounds, tau, radius, sigma=sigma, delta=delta)
    table = pool.tilted(tau)
    multipliers = _minimise_barrier(table, bounds, tau, sigma, delta)
    return _solution(pool, table, multipliers, bounds, tau, radius, sigma=sigma, delta=delta)


def check_temperature(tau: float) -> None:
    """Refuse a τ that is no temperature. Raises ValueError."""
    if not (np.isfinite(tau) and tau > 0):
        raise ValueError(
            f"tau: {tau} is no strength of the KL penalty; it is above 0, in units of win probability per nat. The "
            "paper uses 0.08 for text."
        )


# ---- the convex dual -------------------------------------------------------------------------------------------

Derivatives = Callable[[Array], tuple[float, Array, Array]]


def _dual_moments(table: SampleTable, bounds: Array, tau: float) -> Derivatives:
    def of(multipliers: Array) -> tuple[float, Array, Array]:
        found = moments(table, np.concatenate([[1.0], multipliers])[None])
        value = tau * float(found.objective[0]) - float(multipliers @ bounds)
        return value, tau * found.gradient[0, 1:] - bounds, tau * found.hessian[0, 1:, 1:]

    return of


def _minimise(derivatives: Derivatives, start: Array, upper: float = np.inf) -> Array:
    """Minimise a convex function over 0 ≤ λ ≤ upper by Newton steps on the multipliers that are free to move."""
    point = start
    value, slope, curvature = derivatives(point)
    for _ in range(MAX_STEPS):
        if _projected(slope, point, upper) <= TOLERANCE:
            break
        held = ((point <= 0) & (slope > 0)) | ((point >= upper) & (slope < 0))
        free = np.flatnonzero(~held)
        step = np.zeros_like(point)
        small = curvature[np.ix_(free, free)]
        damping = 1e-12 * max(np.trace(small), 1e-12)
        step[free] = -np.linalg.solve(small + damping * np.eye(len(free)), slope[free])
        size = 1.0
        while True:
            trial = np.clip(point + size * step, 0.0, upper)
            tried = derivatives(trial)
            fall = float(slope @ (point - trial))
            flat = 8 * np.finfo(float).eps * max(1.0, abs(value))
            if tried[0] <= value - 1e-4 * fall or (size < 1e-12):
                break
            if abs(tried[0] - value) <= flat and _projected(tried[1], trial, upper) < _projected(slope, point, upper):
                break
            size *= 0.5
        if size < 1e-12:
            break
        point, (value, slope, curvature) = trial, tried
        if point.max(initial=0.0) > RUNAWAY:
            raise RunawayError(int(point.argmax()), float(point.max()))
    return point


def _minimise_barrier(table: SampleTable, bounds: Array, tau: float, sigma: float, delta: float) -> Array:
    """Minimise g(λ) − σ Σ log λ_j over 0 < λ ≤ σ/δ."""
    smooth = _dual_moments(table, bounds, tau)

    def of(multipliers: Array) -> tuple[float, Array, Array]:
        if multipliers.min(initial=1.0) <= 0:
            return np.inf, np.zeros_like(multipliers), np.eye(len(multipliers))
        value, slope, curvature = smooth(multipliers)
        return (
            value - sigma * float(np.log(multipliers).sum()),
            slope - sigma / multipliers,
            curvature + np.diag(sigma / multipliers**2),
        )

    return _minimise(of, np.full(len(bounds), min(sigma, 0.5 * sigma / delta)), upper=sigma / delta)


def _projected(slope: Array, point: Array, upper: float) -> float:
    """‖λ − clip(λ − ∇)‖_∞: 0 exactly where no allowed move descends."""
    return float(np.abs(point - np.clip(point - slope, 0.0, upper)).max(initial=0.0))


def _solution(
    pool: Pool,
    table: SampleTable,
    multipliers: Array,
    bounds: Array,
    tau: float,
    radius: float,
    *,
    sigma: float | None = None,
    delta: float = 1.0,
) -> Solution:
    """What λ makes of the pool. table: tilted with q̄ · Q/π_ref.

    An adversary Q that has something left to gain is in the residual: its bound is met under Q, and missed under the
    worst one.
    """
    weights = np.concatenate([[1.0], multipliers])
    found = tilted_weights(table, weights)
    rho = found / np.exp(pool.log_reference)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.where(found > 0, found * np.log(rho), 0.0)
    secondary = pool.expectation(rho[:, None] * pool.secondary)
    worst = [robust_bound(pool.joint_log_reference, rho * column, radius) for column in pool.secondary.T]
    robust = np.array([bound.value for bound in worst]).reshape(-1)
    if sigma is None:
        residual = _projected(robust - bounds, multipliers, np.inf)
    else:
        residual = float(np.abs(_slack(multipliers, robust - bounds, sigma, delta)).max(initial=0.0))
    return Solution(
        multipliers=multipliers,
        chi=np.array([bound.chi for bound in worst]).reshape(-1),
        ratio=rho,
        primary=float(pool.expectation(rho * pool.primary)),
        secondary=secondary,
        robust=robust,
        kl=float(entropy.sum() / pool.num_prompts),
        dual_value=tau * float(log_partition(table, weights).mean()) - float(multipliers @ bounds),
        residual=residual,
        effective_sample_size=effective_sample_size(table, weights),
    )


def _slack(multipliers: Array, slack: Array, sigma: float, delta: float) -> Array:
    """How far λ_j is from σ/max(slack_j, δ), as a difference of slacks."""
    held = multipliers >= sigma / delta * (1 - 1e-12)
    return np.where(held, np.maximum(slack - delta, 0.0), slack - sigma / multipliers)


# ---- with a radius ---------------------------------------------------------------------------------------------


def _solve_robust(
    pool: Pool, bounds: Array, tau: float, radius: float, *, sigma: float | None = None, delta: float = 1.0
) -> Solution:
    """The saddle of ρ against the worst distributions Q_j within the radius: Q moves towards what is worst for ρ.

    For Q held, the problem is that of `solve_lagrangian` with q̄_j Q_j/π_ref in the place of q̄_j, whose dual is an
    upper bound on the robust optimum; over (λ, λ Q) it is convex. Each round moves Q by Frank–Wolfe, with the share
    that halves until the dual falls, and ends where Q has nothing left to gain.
    """
    tilts = np.ones_like(pool.secondary)

    def solved(tilts: Array, start: Array) -> tuple[SampleTable, Array, float]:
        table = pool.tilted(tau, pool.secondary * tilts)
        if sigma is None:
            multipliers = _minimise(_dual_moments(table, bounds, tau), start)
        else:
            multipliers = _minimise_barrier(table, bounds, tau, sigma, delta)
        value = _dual_moments(table, bounds, tau)(multipliers)[0]
        return table, multipliers, value - (0.0 if sigma is None else sigma * float(np.log(multipliers).sum()))

    table, multipliers, value = solved(tilts, np.zeros(pool.num_secondary))
    share = 1.0
    for _ in range(MAX_ROUNDS):
        rho = tilted_weights(table, np.concatenate([[1.0], multipliers])) / np.exp(pool.log_reference)
        worst = [robust_bound(pool.joint_log_reference, rho * column, radius) for column in pool.secondary.T]
        towards = np.column_stack([bound.tilt for bound in worst])
        left = multipliers * (
            pool.expectation(rho[:, None] * pool.secondary * tilts) - np.array([bound.value for bound in worst])
        )
        if left.max(initial=0.0) <= ROBUST_TOLERANCE:
            break
        share = min(1.0, 2.0 * share)
        while share > 1e-9:
            moved = (1 - share) * tilts + share * towards
            tried = solved(moved, multipliers)
            if tried[2] <= value - 0.25 * share * float(left.sum()) or share < 1e-8:
                break
            share *= 0.5
        tilts, (table, multipliers, value) = moved, tried
    return _solution(pool, table, multipliers, bounds, tau, radius, sigma=sigma, delta=delta)
