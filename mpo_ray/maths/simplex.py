"""The probability simplex, where the weights λ live: its centre, its check, its mirror step."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def uniform(num_objectives: int) -> Array:
    """Return λ_k = 1/K, shape (K,)."""
    return np.full(num_objectives, 1.0 / num_objectives)


def simplex_grid(num_objectives: int, steps: int) -> Array:
    """Every λ whose entries are multiples of 1/steps, shape (C(steps + K − 1, K − 1), K), the vertices among them.

    In lexicographic order: for K = 2 a walk from (0, 1) to (1, 0).
    """
    if num_objectives < 1 or steps < 1:
        raise ValueError(f"A grid needs at least 1 objective and 1 step; got {num_objectives} and {steps}.")
    # Stars and bars: the gaps that K − 1 bars leave among steps + K − 1 places are the entries.
    places = steps + num_objectives - 1
    bars = [(-1, *chosen, places) for chosen in combinations(range(places), num_objectives - 1)]
    return np.asarray((np.diff(bars, axis=1) - 1) / steps, dtype=np.float64)


def check_simplex(weights: Array) -> Array:
    """Return λ as float64, or say why it is not on the simplex {λ : λ_k ≥ 0, Σ_k λ_k = 1 (to 1e-6)}.

    weights: (K,). Raises ValueError.
    """
    values = np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"weights have shape {values.shape}; give one weight per objective, shape (K,) with K ≥ 1.")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"weights {values.tolist()} are not all finite and at least 0; give probabilities.")
    if abs(values.sum() - 1.0) > 1e-6:
        raise ValueError(f"weights {values.tolist()} sum to {values.sum():g}, not 1; divide each by the sum.")
    return values


def exponentiated_gradient_step(log_weights: Array, gradient: Array, step_size: float) -> Array:
    """Take one mirror step, λ_k ← λ_k exp(−η v_k) / norm, and return log λ   (design 2.2, eq. 5)

    Minimises ⟨v, λ'⟩ + KL(λ' ‖ λ)/η over the simplex: no projection is needed. In logarithms, so that a weight that
    falls below the smallest float can come back; −inf (weight 0) stays.

    log_weights: (K,) log λ, need not be normalised
    gradient: (K,) v, nats
    step_size: η, 1/nats
    Returns (K,) log λ, normalised.
    """
    moved = log_weights - step_size * gradient
    moved = moved - moved.max()
    return np.asarray(moved - np.log(np.exp(moved).sum()))
