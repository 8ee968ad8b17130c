"""A model whose sliding windows are short for a while, so that a short text shows what an attention makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: Where configurations and layers of transformers keep the number of tokens that a layer sees.
_NAMES = ("sliding_window", "attention_window_size", "window_size")


@contextmanager
def short_windows(model: Any, num_tokens: int) -> Iterator[None]:
    """Let every window of the model that is longer be this many tokens long while the block runs.

    Masks are made from the configuration, and some layers hand the attention a number of their own: both change.
    """
    owners = [*{id(one): one for module in model.modules() if (one := getattr(module, "config", None))}.values()]
    changed = [
        (owner, name, value)
        for owner in (*owners, *model.modules())
        for name in _NAMES
        if isinstance(value := getattr(owner, name, None), int) and value > num_tokens
    ]
    try:
        for owner, name, _ in changed:
            setattr(owner, name, num_tokens)
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)
