"""Which of several ways takes the least time on this machine: all are timed by turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

#: How often each way is timed, after a first time that prepares.
TIMES = 5

Way = TypeVar("Way", bound=Hashable)


def shortest_seconds(ways: Mapping[Way, Callable[[], object]]) -> dict[Way, float]:
    """The shortest time of each way, in which other work on the machine counts least."""
    seconds: dict[Way, float] = {}
    for turn in range(TIMES + 1):
        for name, way in ways.items():
            before = time.perf_counter()
            way()
            taken = time.perf_counter() - before
            if turn:
                seconds[name] = min(taken, seconds.get(name, taken))
    return seconds
