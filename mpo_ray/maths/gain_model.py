"""A model of the gains g(λ) between the points where they were observed, and its max–min.

A Gaussian process per objective: a linear trend over the simplex plus a smooth bend. Knows nothing of who observed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mpo_ray.maths.simplex import Array

#: Prior standard deviations in units of win rate: of the level, of the trend per unit of λ_k, and of the bend, whose
#: length on the simplex is BEND_LENGTH.
LEVEL, TREND, BEND, BEND_LENGTH = 1.0, 0.5, 0.1, 1.0
#: No observation counts as more certain than this: identical outcomes of a few prompts are no proof.
LEAST_ERROR = 0.003
#: Ascents on the minimum, how sharp it is at the first and the last, and a weight that is as good as none.
NUM_ASCENTS, FIRST_TEMPERATURE, LAST_SHARE, NO_WEIGHT = 200, 0.03, 0.02, 1e-3


@dataclass(frozen=True, eq=False)
class GainModel:
    """Gains observed at N points, and what they say of every other point.

    points: (N, K) λ; gains: (N, K) ĝ_k, in units of win rate; errors: (N, K) their standard errors
    The posterior mean under the prior covariance

        c(λ, λ') = level² + trend² ⟨λ, λ'⟩ + bend² exp(−‖λ − λ'‖²/2 length²)
    """

    points: Array
    gains: Array
    errors: Array

    def __post_init__(self) -> None:
        for name in ("points", "gains", "errors"):
            if getattr(self, name).shape != self.points.shape or not np.isfinite(getattr(self, name)).all():
                raise ValueError(
                    f"the {name} of an observed game are finite and {self.points.shape} (points, objectives); "
                    f"got shape {getattr(self, name).shape}."
                )

    @cached_property
    def _precision(self) -> Array:
        """(K, N, N) inverse covariance of each objective's observations."""
        covariance = _covariance(self.points, self.points)
        noise = np.maximum(self.errors, LEAST_ERROR).T[:, :, None] ** 2 * np.eye(len(self.points))
        return np.asarray(np.linalg.inv(covariance + noise))

    @cached_property
    def _coefficients(self) -> Array:
        """(N, K) of the posterior mean: g_k(λ) = Σ_n c(λ, λ_n) a_nk."""
        return np.asarray(np.einsum("kij,jk->ik", self._precision, self.gains))

    def redrawn(self, rng: np.random.Generator) -> GainModel:
        """The same points with other noise: gains ĝ + ε, ε ∼ N(0, error²)."""
        model = GainModel(self.points, self.gains + self.errors * rng.normal(size=self.gains.shape), self.errors)
        model.__dict__["_precision"] = self._precision
        return model

    def mean(self, weights: Array) -> Array:
        """E[g(λ) | observed], (S, K) at weights (S, K)."""
        return np.asarray(_covariance(weights, self.points) @ self._coefficients)

    def error(self, weights: Array) -> Array:
        """Standard deviation of g(λ) given what was observed, (S, K) at weights (S, K)."""
        across = _covariance(weights, self.points)
        known = np.einsum("sn,knm,sm->sk", across, self._precision, across)
        return np.asarray(np.sqrt(np.maximum(np.diag(_covariance(weights, weights))[:, None] - known, 0.0)))

    def slope(self, weights: Array, shares: Array) -> Array:
        """∂/∂λ Σ_k p_k E[g_k(λ)], (S, K) at weights (S, K) and shares p (S, K)."""
        along = shares @ self._coefficients.T
        bend = _bend(weights, self.points) * along / BEND_LENGTH**2
        return np.asarray(
            TREND**2 * along @ self.points + bend @ self.points - bend.sum(axis=1, keepdims=True) * weights
        )


def maximin(model: GainModel) -> Array:
    """Find λ with the largest min_k E[g_k(λ)] in the convex hull of the observed points, (K,)   (design 2.2)

    λ = Σ_n c_n λ_n with c on the simplex: the model is not asked beyond what was observed. Mirror ascent on c from the
    centre of the hull and from next to every point, with a minimum that is made sharper and steps that are made
    smaller; the best point that was visited. Weights below 0.001 become 0.
    """
    points = model.points
    num_points = len(points)
    shares = np.vstack([np.full(num_points, 1.0 / num_points), 0.9 * np.eye(num_points) + 0.1 / num_points])
    best, most = points[0], -np.inf
    for step in range(NUM_ASCENTS):
        cooling = LAST_SHARE ** (step / NUM_ASCENTS)
        weights = shares @ points
        gains = model.mean(weights)
        least = gains.min(axis=1)
        if least.max() > most:
            best, most = weights[least.argmax()], float(least.max())
        soft = np.exp((least[:, None] - gains) / (FIRST_TEMPERATURE * cooling))
        upward = model.slope(weights, soft / soft.sum(axis=1, keepdims=True)) @ points.T
        upward -= (shares * upward).sum(axis=1, keepdims=True)
        moved = shares * np.exp(cooling * upward / np.maximum(np.abs(upward).max(axis=1, keepdims=True), 1e-9))
        shares = moved / moved.sum(axis=1, keepdims=True)
    kept = np.where(best < NO_WEIGHT, 0.0, best)
    return np.asarray(kept / kept.sum())


def _covariance(a: Array, b: Array) -> Array:
    return np.asarray(LEVEL**2 + TREND**2 * a @ b.T + _bend(a, b))


def _bend(a: Array, b: Array) -> Array:
    distance = np.square(a[:, None] - b[None]).sum(axis=-1)
    return np.asarray(BEND**2 * np.exp(-distance / (2 * BEND_LENGTH**2)))
