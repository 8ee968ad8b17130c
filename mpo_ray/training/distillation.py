"""Distillation: a student that learns another model's next-token distributions along given completions.

    loss = mean over the completions' tokens of a step of KL(q_t ‖ student_t)

q_t is the teacher's whole distribution, not the token that was drawn from it, so the loss has no noise of sampling
beyond the choice of places. Its least value is 0, where both distributions agree at every place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from mpo_ray.data.tokens import TokenBatch, collate
from mpo_ray.maths.sequence_logprob import token_kl
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.training.sft import Example


class Teacher(Protocol):
    """What predicts completions' tokens: a mixture, or a `CompletionModel`."""

    def predictions(self, batch: TokenBatch) -> torch.Tensor:
        """Logits (N, V) that predict the completions' N tokens, row after row."""


def distillation_loss(
    student: CompletionModel, teacher: Teacher, texts: Sequence[Example], *, pad_id: int, device: torch.device | str
) -> torch.Tensor:
    """Σ KL(q_t ‖ student_t) over all completion tokens of the batch, a scalar, nats."""
    batch = collate([(t.prompt_ids, t.response_ids) for t in texts], pad_id=pad_id).to(device)
    with torch.no_grad():
        wanted = teacher.predictions(batch)
    return token_kl(wanted, student.predictions(batch)).sum()
