"""A causal LM as a distribution over completions: token ids in, log-probabilities of the completion out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mpo_ray.data.tokens import TokenBatch
from mpo_ray.maths.sequence_logprob import prediction_mask, sequence_logprob
from mpo_ray.policies.packed_layout import packed_inputs
from mpo_ray.policies.ragged_attention import enable_packing


class CompletionModel(nn.Module):
    """Wraps a causal LM (PEFT or plain). The engine owns this module, so that its forward is what is sharded.

    The head is applied only where a completion's token is predicted. Where the architecture allows it exactly, padding
    is left out of every layer as well, and a prompt that several rows share is computed once.
    """

    def __init__(self, causal_lm: Any) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.packs = enable_packing(causal_lm)

    def train(self, mode: bool = True) -> CompletionModel:
        """As of every module, without the noise that some experts' routers add then: a policy and its reference must
        choose the same experts."""
        super().train(mode)
        for module in self.modules():
            if any("jitter_noise" in name for name in vars(module)):
                module.training = False
        return self

    def forward(self, batch: TokenBatch, *, length_normalized: bool = False) -> torch.Tensor:
        """log π(completion | prompt), nats: summed, or averaged over tokens if `length_normalized`. Returns (B,)."""
        logits = self.predictions(batch)
        return sequence_logprob(logits, batch.input_ids, batch.completion_mask, length_normalized=length_normalized)

    def predictions(self, batch: TokenBatch) -> torch.Tensor:
        """Logits (N, V) that predict the completions' N tokens, row after row."""
        kept = prediction_mask(batch.completion_mask)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self.packs:
            places, inputs = packed_inputs(batch.input_ids, batch.attention_mask, _stand_ins(batch))
            kept = kept.flatten()[places].unsqueeze(0)
        logits: torch.Tensor = self.causal_lm(**inputs, logits_to_keep=kept, use_cache=False).logits
        return logits


def _stand_ins(batch: TokenBatch) -> torch.Tensor | None:
    """(B, T) places of the tokens computed for those of a batch: a shared prompt's in its first row, others their own.

    The last token of a prompt is not shared: each row predicts its own completion from there.
    """
    if batch.prompt_rows is None:
        return None
    num_rows, width = batch.input_ids.shape
    columns = torch.arange(width, device=batch.input_ids.device)
    own = torch.arange(num_rows, device=columns.device)[:, None] * width + columns
    prompt = batch.attention_mask.bool() & ~batch.completion_mask & ~prediction_mask(batch.completion_mask)
    return torch.where(prompt, batch.prompt_rows[:, None] * width + columns, own)
