"""Attention over tokens of many sequences that lie end to end, as one row: what no layer computes is padding.

One implementation is registered with transformers. Where its tokens belong is told by a *layout*: a batch without a
cache (`packed_layout`), or blocks of a KV cache (`block_attention`). A call without a layout is transformers' own
`sdpa`, unchanged. Which models may be run so is said here as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mpo_ray.policies.families import packs
from mpo_ray.policies.loading import ModelError

NAME = "mpo_ray_ragged"


class Layout(Protocol):
    """Where each of the N tokens of a pass belongs."""

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        """query, key: (1, heads or key heads, N, d); value: (1, key heads, N, d_v). Returns (1, N, heads, d_v).

        how: what transformers tells an attention: scaling, softcap, sliding_window, dropout
        """


class NotInBlocksError(ModelError):
    """A model that would be decoded wrongly with its cache in blocks. The message says why."""


_LAYOUT: ContextVar[Layout | None] = ContextVar("ragged_layout", default=None)


@contextmanager
def laid_out(model: Any, layout: Layout) -> Iterator[None]:
    """Passes of the model lie as `layout` says while the block runs; before and after it has its own attention."""
    config = model.config.get_text_config()
    own, config._attn_implementation = config._attn_implementation, NAME
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)
        config._attn_implementation = own


def ragged_inputs(tokens: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """A model's arguments for tokens that lie end to end. tokens, positions: (N,), each position in its own sequence"""
    return {
        "input_ids": tokens[None],
        "position_ids": positions[None],
        # transformers hands a mask of four dimensions through as it is; here it keeps it from building one
        "attention_mask": torch.empty(1, 1, 1, 1, device=tokens.device),
    }


def enable_packing(causal_lm: Any) -> bool:
    """Let a causal LM (PEFT or plain) take packed batches, if they get exactly what they get alone; say whether.

    The layout is then an argument of the model's forward, `ragged_layout`: activations that are computed anew in a
    backward pass have it too, as they would not have what `laid_out` sets.
    """
    config = causal_lm.config
    plain = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    if not packs(config.model_type) or not plain or getattr(config, "sliding_window", None) is not None:
        return False
    if config._attn_implementation == "sdpa":
        base = causal_lm.get_base_model() if hasattr(causal_lm, "get_base_model") else causal_lm
        base.set_attn_implementation(NAME)
    return bool(config._attn_implementation == NAME)


def carries_states(config: Any) -> str | None:
    """What kind of layer a model of this configuration has whose cache is not keys and values alone, or None.

    What such a layer carries from token to token has no place for padding, so that rows are computed apart.
    """
    kinds = {type(layer) for layer in DynamicCache(config=config.get_text_config()).layers}
    return min((kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer}), default=None)


def blocks_refusal(config: Any) -> str | None:
    """Why a model of this configuration cannot be in blocks, as a clause; None where only a trial can tell.

    The trial is `decoding.branch`'s. What cannot is decoded in transformers' own cache instead.
    """
    text = config.get_text_config()
    if (kind := carries_states(config)) is not None:
        return f"it has layers whose cache is not keys and values alone ({kind})"
    types = sorted({*(getattr(text, "layer_types", None) or [])} - {"full_attention", "sliding_attention"})
    if types:
        return f"it has layers of the type {types[0]!r}"
    return None


def _ragged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    ragged_layout: Layout | None = None,
    **how: Any,
) -> tuple[Tensor, None]:
    layout = _LAYOUT.get() if ragged_layout is None else ragged_layout
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)  # type: ignore[no-any-return]
    return layout.attend(module, query, key, value, **how), None


AttentionInterface.register(NAME, _ragged_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
