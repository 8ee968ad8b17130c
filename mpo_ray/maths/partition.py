"""The partition function Z_λ of the sequence-level mixture, its objective F and what samples of π_ref say about them.

Every function takes the table ℓ of log-ratios on samples of the reference, so nothing here samples or knows a model.
All of them stand for the expectation over π_ref by the mean over the S samples of a prompt.
"""

from __future__ import annotations

import numpy as np

from mpo_ray.maths.simplex import Array


def log_partition(log_ratios: Array, weights: Array) -> Array:
    """Estimate log Z_λ(x) = log E_{y ∼ π_ref} exp(Σ_k λ_k ℓ_k(x, y))   (design 2.2, eq. 2)

    log_ratios: (B, S, K) ℓ_k = log π_k(y|x) − log π_ref(y|x), nats, for S samples y ∼ π_ref(·|x)
    weights: (K,) λ
    Returns (B,), nats. The mean sits inside the logarithm: biased low, by O(1/S).
    """
    tilt = log_ratios @ weights
    return np.asarray(np.logaddexp.reduce(tilt, axis=1) - np.log(tilt.shape[1]))


def tilted_weights(log_ratios: Array, weights: Array) -> Array:
    """Weigh the samples of π_ref as samples of π_λ: w_s = softmax_s(Σ_k λ_k ℓ_k(x, y_s))   (design 2.2, eq. 5)

    log_ratios: (B, S, K) nats, as in `log_partition`
    weights: (K,) λ
    Returns (B, S), each row sums to 1. Self-normalised importance weights: what is averaged under them has bias O(1/S).
    """
    tilt = log_ratios @ weights
    unnormalized = np.exp(tilt - tilt.max(axis=1, keepdims=True))
    return np.asarray(unnormalized / unnormalized.sum(axis=1, keepdims=True))


def objective(log_ratios: Array, weights: Array) -> float:
    """Estimate F(λ) = E_x log Z_λ(x), which the fit minimises   (design 2.2, eq. 3)

    log_ratios: (B, S, K) nats, as in `log_partition`; the B prompts count alike
    weights: (K,) λ
    Returns nats. Convex in λ; biased low like `log_partition`, so that it may be above or below 0 at a vertex, where
    the exact F is 0.
    """
    return float(log_partition(log_ratios, weights).mean())


def gradient(log_ratios: Array, weights: Array) -> Array:
    """Estimate ∂F/∂λ_k = E_x E_{y ∼ π_λ}[ℓ_k(x, y)]   (design 2.2, eq. 4)

    log_ratios: (B, S, K) nats, as in `log_partition`
    weights: (K,) λ
    Returns (K,), nats: the exact gradient of `objective`, and an estimate of F's with bias O(1/S).
    """
    return np.asarray(np.einsum("bs,bsk->k", tilted_weights(log_ratios, weights), log_ratios) / len(log_ratios))


def gap(gradient: Array, weights: Array) -> float:
    """Bound the distance to the optimum: gap(λ) = ⟨∇F, λ⟩ − min_k ∂F/∂λ_k ≥ F(λ) − F(λ*)   (design 2.2, eq. 6)

    gradient: (K,) ∇F(λ), nats
    weights: (K,) λ on the simplex
    Returns nats, never negative, 0 exactly at an optimum of the F that the gradient belongs to.
    """
    return float(gradient @ weights - gradient.min())


def effective_sample_size(log_ratios: Array, weights: Array) -> Array:
    """Count how many of a prompt's S samples carry the estimate at λ: ESS = 1 / Σ_s w_s²   (design 2.2)

    log_ratios: (B, S, K) nats, as in `log_partition`
    weights: (K,) λ
    Returns (B,), between 1 (one sample decides) and S (all count alike).
    """
    return np.asarray(1.0 / np.square(tilted_weights(log_ratios, weights)).sum(axis=1))
