"""Which models can be decoded with their cache in slots: what their configuration alone says against it.

The rest is found by trying (`decoding.branch`). What cannot is decoded in transformers' own cache instead.
"""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mpo_ray.policies.loading import ModelError

#: Rotary positions that change with the longest sequence of a batch: a short trial does not show it.
_CHANGING_ROPES = {"dynamic", "longrope"}


class NotInSlotsError(ModelError):
    """A model that would be decoded wrongly with its cache in slots. The message says why."""


def slots_refusal(config: Any) -> str | None:
    """Why a model of this configuration cannot be in slots, as a clause; None where only a trial can tell."""
    text = config.get_text_config()
    kinds = {type(layer) for layer in DynamicCache(config=text).layers}
    other = sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer})
    if other:
        return f"it has layers whose cache is not keys and values alone ({other[0]})"
    types = sorted({*(getattr(text, "layer_types", None) or [])} - {"full_attention", "sliding_attention"})
    if types:
        return f"it has layers of the type {types[0]!r}"
    rope = getattr(text, "rope_parameters", None) or {}
    found = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    changing = sorted(found & _CHANGING_ROPES)
    if changing:
        return f"its rotary positions are {changing[0]!r}: they change with the longest sequence of a batch"
    return None
