"""log Z_t beside the logits, in a form that comes through vLLM's table of likeliest tokens.

vLLM hands out figures of tokens only. So log Z_t is made the logits of two tokens past the vocabulary, which are above
all others, in two digits that float32 holds exactly enough: a whole part, and 256ths of the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Tokens that are no tokens: how many more likeliest ones have to be asked for.
NUM_COLUMNS = 2
_WHOLE, _REST = 4096.0, 1024.0
_FINENESS = 256.0


def with_log_z(logprobs: Tensor, log_z: Tensor) -> Tensor:
    """(N, V) and (N,) → (N, V + 2)."""
    whole = log_z.round()
    rest = (log_z - whole) * _FINENESS
    return torch.cat([logprobs, (_WHOLE + whole)[:, None], (_REST + rest)[:, None]], dim=-1)


def read_log_z(whole: float, rest: float) -> float:
    """log Z_t, nats, of the logits of the two tokens."""
    return (whole - _WHOLE) + (rest - _REST) / _FINENESS
