"""Lines on standard error that say what a command waits for, where that takes longer than a moment."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Seconds after which a wait is told.
SLOW_S = 3.0


@contextmanager
def told_if_slow(text: str, tell: Callable[[str], object] | None = None) -> Iterator[None]:
    """Say what the block does, if it takes longer than `SLOW_S` seconds. tell: says it elsewhere"""
    timer = threading.Timer(SLOW_S, tell or say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
