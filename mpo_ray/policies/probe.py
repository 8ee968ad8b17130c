"""A short text that a model is tried with when it is opened, and how far its logits may be from its own."""

from __future__ import annotations

from typing import Any

import torch

#: Tokens, and the window that sliding windows get meanwhile, so that the text reaches beyond them.
PROBE, WINDOW = (3, 5, 4, 1, 6, 2, 7, 3), 3
#: Between logits of one model that were computed in two ways, by its precision.
MOST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.5}


def probe_ids(model: Any) -> list[int]:
    """The text as token ids that the causal LM has."""
    size = model.config.get_text_config().vocab_size
    return [token % size for token in PROBE]
