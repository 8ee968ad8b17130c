"""Several sequences end to end without a cache: a padded batch of which no layer computes the padding.

A prompt that several rows share is computed once. Attention alone sees the padded batch: causality keeps padding on the
right from every real token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mpo_ray.policies.ragged_attention import ragged_inputs


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Where N computed tokens lie in a padded batch.

    shape: (B, T) of the batch; real: (R,) places of its real tokens; places: (N,) places of the computed ones
    sources: (R,) for each real token the number, below N, of the computed one that is the same; None where R = N
    """

    shape: tuple[int, int]
    real: Tensor
    places: Tensor
    sources: Tensor | None

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        """As `ragged_attention.Layout.attend`."""
        attended, _ = sdpa_attention_forward(
            module, self._padded(query), self._padded(key), self._padded(value), None, **{**how, "is_causal": True}
        )
        found: Tensor = attended.flatten(0, 1).index_select(0, self.places).unsqueeze(0)
        return found

    def _padded(self, states: Tensor) -> Tensor:
        """(1, heads, N, d) → (B, heads, T, d)."""
        rows, width = self.shape
        flat = states[0].transpose(0, 1)
        if self.sources is not None:
            flat = flat.index_select(0, self.sources)
        spread = flat.new_zeros(rows * width, *flat.shape[1:]).index_copy(0, self.real, flat)
        return spread.view(rows, width, *flat.shape[1:]).transpose(1, 2)


def packed_inputs(
    input_ids: Tensor, attention_mask: Tensor, stand_ins: Tensor | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """What a model takes in the place of a padded batch: its real tokens as one row, each at its own position.

    input_ids, attention_mask: (B, T), padded on the right
    stand_ins: (B, T) for each token the place, in the flattened batch, of the one computed for it: its own, or that of
        the same token in another row where all before it is the same too
    Returns (N,) the places of the N computed tokens in the flattened batch, and the model's arguments.
    """
    real = attention_mask.flatten().nonzero().squeeze(-1)
    places, sources = real, None
    if stand_ins is not None:
        wanted = stand_ins.flatten()[real]
        places = real[wanted == real]
        numbers = torch.arange(len(places), device=real.device)
        number = torch.zeros_like(stand_ins).flatten().index_copy(0, places, numbers)
        sources = number[wanted]
    layout = PackedBatch((input_ids.shape[0], input_ids.shape[1]), real, places, sources)
    inputs = ragged_inputs(input_ids.flatten()[places], places % input_ids.shape[1])
    return places, {**inputs, "ragged_layout": layout}
