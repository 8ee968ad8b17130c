"""A short text that a model is tried with when it is opened, and how far its logits may be from its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Tokens, and the window that sliding windows get meanwhile, so that the text reaches beyond them.
PROBE, WINDOW = (3, 5, 4, 1, 6, 2, 7, 3), 3
#: The `difference` between logits of one model that were computed in two ways, by its precision. In bfloat16 a real
#: model's own logits are 0.1 apart where the same text is computed at once and token by token (SmolLM2-135M).
MOST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}


def probe_ids(model: Any) -> list[int]:
    """The text as token ids that the causal LM has."""
    size = model.config.get_text_config().vocab_size
    return [token % size for token in PROBE]


def difference(logits: Tensor, expected: Tensor) -> float:
    """‖logits − expected‖ / ‖expected‖, both without the mean of each position, which says nothing. (…, V) each"""
    found, own = (each.double() - each.double().mean(-1, keepdim=True) for each in (logits, expected))
    return float((found - own).norm() / own.norm().clamp_min(1e-12))
