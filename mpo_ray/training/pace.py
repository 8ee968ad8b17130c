"""How fast a training goes, and how long the rest of it takes."""

from __future__ import annotations

#: Names of the figures. The first is in tokens of the whole batch a second, the other in seconds.
TOKENS_PER_S, SECONDS_LEFT = "tokens_per_s", "seconds_left"


class Pace:
    """The mean over all steps so far but the first, which waits for memory and caches; of the first where it is alone.

    start: steps done before, at the time `now` (seconds of any clock); tokens_per_step: mean over the examples
    """

    def __init__(self, *, start: int, total: int, tokens_per_step: float, now: float) -> None:
        self._total, self._tokens = total, tokens_per_step
        self._from, self._base = start, (start, now)

    def after(self, step: int, now: float) -> dict[str, float]:
        """The figures after a step; to be asked after the first step too."""
        done, since = self._base
        if done == self._from:
            self._base = step, now
        seconds = max(now - since, 1e-9) / (step - done)
        return {TOKENS_PER_S: self._tokens / seconds, SECONDS_LEFT: (self._total - step) * seconds}
