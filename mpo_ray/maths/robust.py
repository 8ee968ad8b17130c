"""The robust bound: the least expectation of a value when the distribution may move by a radius in KL.

Knows nothing of policies or objectives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp

from mpo_ray.maths.simplex import Array

#: Where log χ is looked for, from the spread of the values: a χ this small is the minimum, this large the mean.
SMALLEST, LARGEST = 1e-9, 1e9
#: Where steps of χ end, for values with a mean of at most 1, as ρ q̄ has: exp(−v/χ) of their least is above 0 there.
LEAST_CHI = 2e-3


@dataclass(frozen=True, slots=True, eq=False)
class RobustBound:
    """min_{KL(Q‖π_ref) ≤ ε} E_Q[v] and where it is reached.

    value: in the unit of v; chi: χ*, in that unit too, ∞ for ε = 0 and 0 where the minimum of v is within the radius
    tilt: (N,) Q*/π_ref, which averages to 1 under π_ref
    """

    value: float
    chi: float
    tilt: Array


def robust_bound(log_reference: Array, values: Array, radius: float) -> RobustBound:
    """Solve sup_{χ > 0} −χ log E_ref exp(−v/χ) − χ ε   (design 2.4, eq. 12)

    log_reference: (N,) log π_ref, nats, which sums to 1; values: (N,) v = ρ q̄; radius: ε ≥ 0, nats
    Q*(y) ∝ π_ref(y) exp(−v(y)/χ*), and χ* is where KL(Q*‖π_ref) = ε: log χ is searched, as χ* grows like 1/√ε.
    """
    check_radius(radius)
    least, spread = float(values.min()), float(values.max() - values.min())

    def excess(log_chi: float) -> float:
        log_tilt = _log_tilt(log_reference, values, np.exp(log_chi))
        return float(np.exp(log_reference + log_tilt) @ log_tilt) - radius

    low, high = np.log(SMALLEST * max(spread, SMALLEST)), np.log(LARGEST * max(spread, SMALLEST))
    if radius == 0 or spread == 0 or excess(high) >= 0:  # no room to move in, as far as float64 resolves it
        return RobustBound(float(np.exp(log_reference) @ values), np.inf, np.ones(len(values)))
    if excess(low) <= 0:  # all that is within rounding of the minimum is within the radius
        return RobustBound(least, 0.0, np.exp(_log_tilt(log_reference, values, np.exp(low))))
    chi = float(np.exp(brentq(excess, low, high, xtol=1e-13, rtol=1e-14)))
    # −χ log E exp(−v/χ), without the cancellation of large v/χ.
    value = least - chi * float(logsumexp(log_reference - (values - least) / chi)) - chi * radius
    return RobustBound(value, chi, np.exp(_log_tilt(log_reference, values, chi)))


def dual_moments(log_reference: Array, values: Array, log_chi: float) -> Array:
    """E_ref exp(−v/χ) and E_ref (v/χ) exp(−v/χ): what the dual of (12) needs of a batch   (design 2.4, eq. 12)

    log_reference: (N,) log π_ref, nats, which sums to 1; values: (N,) v ≥ 0
    Returns (2,). The moments of batches of equal size average to those of all of them, which the dual itself does not.
    """
    scaled = values / np.exp(log_chi)
    tilt = np.exp(log_reference - scaled)
    return np.array([tilt.sum(), tilt @ scaled])


def dual_at(moments: Array, radius: float, log_chi: float) -> tuple[float, float]:
    """−χ log E_ref exp(−v/χ) − χ ε, and KL(Q_χ‖π_ref), from `dual_moments`   (design 2.4, eq. 12)

    The value is in the unit of v, a lower bound on the robust one at every χ; KL in nats, ε at χ*, and above it where χ
    is too small. With moments of a sample the value is biased high, as the logarithm of a mean is.
    """
    chi = float(np.exp(log_chi))
    mass, slope = np.maximum(moments, np.finfo(np.float64).tiny)
    return float(-chi * (np.log(mass) + radius)), float(-np.log(mass) - slope / mass)


def chi_step(log_chi: float, kl: float, radius: float, step_size: float) -> float:
    """log χ ← log χ + η (KL − ε)/ε, with a share of at most 1 either way   (design 2.4, eq. 12)

    The slope of (12) in log χ is χ (KL(Q_χ‖π_ref) − ε); here it is divided by χ ε, so that one η serves every radius,
    and cut, since KL/ε has no bound. It rests where the slope is 0, or at LEAST_CHI where the minimum is within the
    radius.
    """
    moved = log_chi + step_size * float(np.clip(kl / radius - 1.0, -1.0, 1.0))
    return max(moved, float(np.log(LEAST_CHI)))


def check_radius(radius: float) -> None:
    """Refuse a radius that is no KL divergence. Raises ValueError."""
    if not (np.isfinite(radius) and radius >= 0):
        raise ValueError(
            f"radius: {radius} is no radius in KL divergence; it is 0 (no robustness) or more, in nats. On a pool of a "
            "few candidates per prompt, 0.001 to 0.01 is much already."
        )


def _log_tilt(log_reference: Array, values: Array, chi: float) -> Array:
    """log Q_χ/π_ref, Q_χ ∝ π_ref exp(−v/χ)."""
    exponent = -(values - values.min()) / chi
    return np.asarray(exponent - logsumexp(log_reference + exponent))
