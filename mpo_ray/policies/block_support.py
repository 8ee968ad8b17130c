"""Which models can be decoded with their cache in blocks: what their configuration alone says against it.

The rest is found by trying (`decoding.branch`). What cannot is decoded in transformers' own cache instead.
"""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mpo_ray.policies.loading import ModelError


class NotInBlocksError(ModelError):
    """A model that would be decoded wrongly with its cache in blocks. The message says why."""


def carries_states(config: Any) -> str | None:
    """What kind of layer a model of this configuration has whose cache is not keys and values alone, or None.

    What such a layer carries from token to token has no place for padding, so that rows are computed apart.
    """
    kinds = {type(layer) for layer in DynamicCache(config=config.get_text_config()).layers}
    return min((kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer}), default=None)


def blocks_refusal(config: Any) -> str | None:
    """Why a model of this configuration cannot be in blocks, as a clause; None where only a trial can tell."""
    text = config.get_text_config()
    if (kind := carries_states(config)) is not None:
        return f"it has layers whose cache is not keys and values alone ({kind})"
    types = sorted({*(getattr(text, "layer_types", None) or [])} - {"full_attention", "sliding_attention"})
    if types:
        return f"it has layers of the type {types[0]!r}"
    return None
