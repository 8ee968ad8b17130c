"""A causal LM as a distribution over completions: token ids in, log-probabilities of the completion out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mpo_ray.data.tokens import TokenBatch
from mpo_ray.maths.sequence_logprob import sequence_logprob


class CompletionModel(nn.Module):
    """Wraps a causal LM (PEFT or plain). The engine owns this module, so that its forward is what is sharded."""

    def __init__(self, causal_lm: Any) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, batch: TokenBatch, *, length_normalized: bool = False) -> torch.Tensor:
        """log π(completion | prompt), nats: summed, or averaged over tokens if `length_normalized`. Returns (B,).

        The head is applied from the earliest completion's first token on: prompts need no logits.
        """
        starts = batch.completion_mask.int().argmax(dim=1)
        first = max(int(starts.min()) - 1, 0)
        kept = batch.input_ids.shape[1] - first
        logits = self.causal_lm(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=kept, use_cache=False
        ).logits
        return sequence_logprob(
            logits, batch.input_ids[:, first:], batch.completion_mask[:, first:], length_normalized=length_normalized
        )
