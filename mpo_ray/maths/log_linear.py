"""The token-level log-linear mixture q_t(v) = Π_k π_k(v|y_<t)^λ_k / Z_t: what decoding draws from.

Not the sequence-level mixture π_λ of the theorem: that one is q · Π_t Z_t / Z (design 2.3).
"""

from __future__ import annotations

import torch
from torch import Tensor


def mix_logprobs(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Compute Σ_k λ_k log π_k(v | y_<t), the logits of the token-level mixture   (design 2.3, eq. 7)

    logprobs: (K, ..., V) next-token log-probabilities of the K policies, normalised, nats
    weights: (K,) λ, or (K, B, ...) one λ for each entry of the leading dimensions after K
    Returns (..., V), nats, not normalised: `log_normalizer` gives log Z_t, and subtracting it gives log q_t. A policy
    with weight 0 has no say, even where its probability is 0 (π⁰ = 1).
    """
    factors = weights.to(logprobs.dtype)
    factors = factors.reshape(*factors.shape, *([1] * (logprobs.ndim - factors.ndim)))
    mixed = torch.zeros_like(logprobs[0])
    for policy_logprobs, factor in zip(logprobs, factors, strict=True):
        mixed = mixed + torch.where(factor == 0, 0.0, factor * policy_logprobs)
    return mixed


def log_normalizer(mixed: Tensor) -> Tensor:
    """Compute log Z_t = log Σ_v Π_k π_k(v | y_<t)^λ_k   (design 2.3, eq. 7)

    mixed: (..., V) from `mix_logprobs`, nats
    Returns (...), nats: at most 0 for λ ≥ 0, Σ λ ≥ 1 (Hölder), 0 at a vertex. What decoding token by token drops.
    """
    return mixed.logsumexp(-1)
