"""Losses of preference training, per comparison, and the reward that a trained policy is."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(log_ratio_chosen: Tensor, log_ratio_rejected: Tensor, beta: float) -> Tensor:
    """Compute −log σ(β h), h = ℓ(chosen) − ℓ(rejected)   (design 2.1)

    log_ratio_chosen, log_ratio_rejected: (B,) ℓ = log π_θ(y|x) − log π_ref(y|x), nats
    beta: KL strength β > 0
    Returns (B,), nats: minus the log-probability of the comparison under Bradley and Terry's model with rewards β ℓ.
    """
    return -logsigmoid(beta * (log_ratio_chosen - log_ratio_rejected))


def ipo_loss(log_ratio_chosen: Tensor, log_ratio_rejected: Tensor, beta: float) -> Tensor:
    """Compute (h − 1/(2β))², h = ℓ(chosen) − ℓ(rejected)   (design 2.1)

    log_ratio_chosen, log_ratio_rejected: (B,) ℓ = log π_θ(y|x) − log π_ref(y|x), nats
    beta: KL strength β > 0
    Returns (B,), nats². Unlike DPO's loss it has a finite minimiser when the preference is certain: h = 1/(2β).
    """
    return (log_ratio_chosen - log_ratio_rejected - 1.0 / (2.0 * beta)).square()


def implicit_reward(log_ratio: Tensor, beta: float) -> Tensor:
    """Compute r̃(x, y) = β ℓ(x, y), the reward whose KL-regularised optimum the policy is   (design 2.1, eq. 1)

    log_ratio: (...) ℓ = log π(y|x) − log π_ref(y|x), nats
    beta: KL strength β > 0
    Returns (...), in the reward's unit, normalised so that E_{y ∼ π_ref} exp(r̃/β) = 1 for every prompt.
    """
    return beta * log_ratio
