"""Preference training of one policy: DPO and IPO on pairs whose reference log-probabilities are known (design 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mpo_ray.data.tokens import collate
from mpo_ray.maths.preference_losses import dpo_loss, implicit_reward, ipo_loss
from mpo_ray.policies.completion_model import CompletionModel


@dataclass(frozen=True, slots=True)
class Pair:
    """A tokenised comparison. log_ref_*: log π_ref(completion | prompt), nats, summed over the completion's tokens."""

    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]
    log_ref_chosen: float
    log_ref_rejected: float
    weight: float = 1.0

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of a batch of pairs under a policy.

    losses: (B,), with gradient, each pair's loss times its weight; margins: (B,), β h, without gradient.
    """

    losses: torch.Tensor
    margins: torch.Tensor

    def statistics(self) -> torch.Tensor:
        """Sums for a mean over batches: loss, accuracy (margin above 0), margin, and the number of pairs. (4,)"""
        count = torch.tensor(float(len(self.losses)), device=self.losses.device)
        return torch.stack(
            [self.losses.detach().sum(), (self.margins > 0).float().sum(), self.margins.sum(), count]
        ).double()


def preference_loss(
    policy: CompletionModel,
    pairs: Sequence[Pair],
    *,
    loss: Literal["dpo", "ipo"],
    beta: float,
    length_normalized: bool,
    pad_id: int,
    device: torch.device | str,
) -> PreferenceLoss:
    """Run chosen and rejected completions through the policy in one forward pass and compare with the reference."""
    sequences = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    logprobs = policy(collate(sequences, pad_id=pad_id).to(device), length_normalized=length_normalized)
    reference = torch.tensor([p.log_ref_chosen for p in pairs] + [p.log_ref_rejected for p in pairs], device=device)
    if length_normalized:
        reference = reference / torch.tensor([len(completion) for _, completion in sequences], device=device)
    chosen, rejected = (logprobs - reference).chunk(2)
    losses = (dpo_loss if loss == "dpo" else ipo_loss)(chosen, rejected, beta)
    weights = torch.tensor([p.weight for p in pairs], device=device)
    return PreferenceLoss(losses * weights, implicit_reward((chosen - rejected).detach(), beta))
