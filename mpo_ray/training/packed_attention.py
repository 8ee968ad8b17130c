"""Causal attention within each of several sequences that lie end to end, so that no layer computes on padding.

Registered with transformers as `sdpa_packed`. A call that says nothing of packing is its `sdpa`, unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_packed"
#: Architectures whose tokens meet only in attention, and whose attention is plain and causal: those under test.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class Packing:
    """Where N computed tokens lie in a padded batch.

    shape: (B, T) of the batch; real: (R,) places of its real tokens; places: (N,) places of the computed ones
    sources: (R,) for each real token the number, below N, of the computed one that is the same; None where R = N
    """

    shape: tuple[int, int]
    real: Tensor
    places: Tensor
    sources: Tensor | None


def enable_packing(causal_lm: Any) -> bool:
    """Let a causal LM (PEFT or plain) take packed sequences, if they get exactly what they get alone; say whether."""
    config = causal_lm.config
    plain = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    if config.model_type not in MODEL_TYPES or not plain or getattr(config, "sliding_window", None) is not None:
        return False
    if config._attn_implementation == "sdpa":
        base = causal_lm.get_base_model() if hasattr(causal_lm, "get_base_model") else causal_lm
        base.set_attn_implementation(NAME)
    return bool(config._attn_implementation == NAME)


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
    return places, {
        "input_ids": input_ids.flatten()[places].unsqueeze(0),
        "position_ids": (places % input_ids.shape[1]).unsqueeze(0),
        # transformers hands a mask of four dimensions through as it is; here it keeps it from building one
        "attention_mask": torch.empty(1, 1, 1, 1, device=places.device),
        "packing": Packing((input_ids.shape[0], input_ids.shape[1]), real, places, sources),
    }


def _packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over the padded batch: with padding on the right, causality alone keeps it from every real token.

    query, key, value: (1, heads, N, d). Returns (1, N, heads, d).
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    rows, width = packing.shape

    def padded(states: Tensor) -> Tensor:
        flat = states[0].transpose(0, 1)
        if packing.sources is not None:
            flat = flat.index_select(0, packing.sources)
        spread = flat.new_zeros(rows * width, *flat.shape[1:]).index_copy(0, packing.real, flat)
        return spread.view(rows, width, *flat.shape[1:]).transpose(1, 2)

    attended, _ = sdpa_attention_forward(
        module, padded(query), padded(key), padded(value), None, **{**kwargs, "is_causal": True}
    )
    return attended.flatten(0, 1).index_select(0, packing.places).unsqueeze(0), None


AttentionInterface.register(NAME, _packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
