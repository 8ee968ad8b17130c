"""Weighted particles: how many of them count, and drawing them again in proportion to their weights (design 2.3).

Groups of N particles side by side; knows nothing of what a particle is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def effective_number(log_weights: Tensor) -> Tensor:
    """(Σ w)² / Σ w² of every group: between 1 and N. log_weights: (G, N), nats. Returns (G,)."""
    return torch.exp(2 * torch.logsumexp(log_weights, 1) - torch.logsumexp(2 * log_weights, 1))


def log_mean_weight(log_weights: Tensor) -> Tensor:
    """log (1/N) Σ w of every group, nats. log_weights: (G, N). Returns (G,)."""
    return torch.logsumexp(log_weights, 1) - torch.log(torch.tensor(float(log_weights.shape[1])))


def systematic_ancestors(log_weights: Tensor, uniforms: Tensor) -> Tensor:
    """Systematic resampling: N evenly spaced points, shifted by u/N, fall on the particles' shares of [0, 1).

    log_weights: (G, N), nats; uniforms: (G,) in [0, 1). Returns (G, N) numbers of particles, ascending: particle n is
    drawn ⌊N w_n⌋ or ⌈N w_n⌉ times, N w_n on average.
    """
    num = log_weights.shape[1]
    cumulative = torch.softmax(log_weights.double(), 1).cumsum(1)
    points = (torch.arange(num, device=log_weights.device) + uniforms[:, None].double()) / num
    return torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True).clamp(max=num - 1)


def drawn_particle(log_weights: Tensor, uniforms: Tensor) -> Tensor:
    """One particle of every group, with probability ∝ w. log_weights: (G, N); uniforms: (G,). Returns (G,)."""
    cumulative = torch.softmax(log_weights.double(), 1).cumsum(1)
    point = uniforms[:, None].double() * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp(max=log_weights.shape[1] - 1)
