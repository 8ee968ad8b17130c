"""Supervised fine-tuning: the negative log-likelihood of given completions, a mean over the tokens of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpo_ray.data.tokens import collate
from mpo_ray.policies.completion_model import CompletionModel


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised text: what is given and what is learned."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def sft_loss(
    model: CompletionModel, texts: Sequence[Example], *, pad_id: int, device: torch.device | str
) -> tuple[torch.Tensor, int]:
    """−Σ log π over all completion tokens of the batch (a scalar, nats), and their number."""
    batch = collate([(t.prompt_ids, t.response_ids) for t in texts], pad_id=pad_id).to(device)
    return -model(batch).sum(), int(batch.completion_mask.sum())
