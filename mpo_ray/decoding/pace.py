"""How much of a completion is told at a time: deltas joined until they hold as many tokens as the hearer wants."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mpo_ray.decoding.protocol import Delta

#: Seconds that a token waits for others, at most, while others come.
LONGEST_WAIT = 0.5


class Pace:
    """What came of one completion and was not told yet.

    tokens_per_delta: asked whenever something was told, for the next time. The first token and the end do not wait.
    """

    def __init__(self, tokens_per_delta: Callable[[], float]) -> None:
        self._tokens_per_delta = tokens_per_delta
        self._held: list[Delta] = []
        self._num_tokens, self._wanted, self._told_at = 0, 1.0, 0.0

    def add(self, delta: Delta) -> Delta | None:
        """What is to be told now that this has come, if anything."""
        self._held.append(delta)
        self._num_tokens += len(delta.tokens)
        if delta.finish_reason is None and self._num_tokens < self._wanted:
            return self.rest() if time.monotonic() - self._told_at > LONGEST_WAIT else None
        return self.rest()

    def rest(self) -> Delta | None:
        """What is held, if anything: nothing follows, or an error does."""
        held, self._held = self._held, []
        if not held:
            return None
        self._num_tokens, self._wanted, self._told_at = 0, self._tokens_per_delta(), time.monotonic()
        return joined(held)


def joined(deltas: Sequence[Delta]) -> Delta:
    """Deltas of one completion that follow each other, as one."""
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    return Delta(
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        text="".join(delta.text for delta in deltas),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None),
        finish_reason=last.finish_reason,
        stop=last.stop,
        diagnostics=last.diagnostics,
    )
