"""From token ids, one at a time, to text that can be sent: whole characters only, cut before a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

#: What a tokenizer writes for bytes that are not yet a whole character.
INCOMPLETE = "\ufffd"


class TextStream:
    """The text of one completion as it grows. The pieces together are the tokenizer's text of all ids, up to a stop."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._context = 0  # ids from here on are decoded together, so that spaces between tokens come out right
        self._decoded = 0  # ids before this have become text
        self._held = ""  # text that may be the beginning of a stop string
        self.watching = True  # whether stop strings count from here on
        self.found: str | None = None  # the stop string that ended the text

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def copy(self) -> TextStream:
        """Another stream that goes on from here."""
        other = copy(self)
        other._ids = list(self._ids)
        return other

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain, perhaps none."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._decoded])
        after = self._decode(self._ids[self._context :])
        if len(after) <= len(before) or after.endswith(INCOMPLETE):
            return ""
        self._context, self._decoded = self._decoded, len(self._ids)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """No token follows: what was held back, incomplete characters included."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._context : self._decoded])
        after = self._decode(self._ids[self._context :])
        text = self._release(after[len(before) :])
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _release(self, text: str) -> str:
        if not self.watching:
            return text
        text = self._held + text
        places = {stop: place for stop in self._stop if (place := text.find(stop)) >= 0}
        if places:
            self.found = min(places, key=lambda stop: (places[stop], -len(stop)))
            self._held = ""
            return text[: places[self.found]]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
