"""From token ids, one at a time, to text that can be sent: whole characters only, cut before a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

#: What a tokenizer writes for bytes that are not yet a whole character.
INCOMPLETE = "\ufffd"
#: Tokens before one that decide whether it begins with a space.
CONTEXT = 4


def tail(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """The last ids of a text that decide how the next token is decoded; the first of them is whole characters."""
    start = max(0, len(ids) - CONTEXT)
    while start > 0:
        text = _decode(tokenizer, ids[start : start + 1])
        if text and INCOMPLETE not in text:
            break
        start -= 1
    return list(ids[start:])


def text_behind(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` behind a prompt: what decode(prompt + ids) has after decode(prompt).

    Many tokenizers drop the space before a text's first word, so that decode(ids) alone would join two words.
    """
    before = tail(tokenizer, prompt_ids)
    return _added(_decode(tokenizer, before), _decode(tokenizer, [*before, *ids]))


class TextStream:
    """The text of one completion as it grows. The pieces together are the tokenizer's text of all ids, up to a stop.

    prompt_ids: of the text that the completion continues (`text_behind`); none for a text that stands alone
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids = tail(tokenizer, prompt_ids)
        self._context = 0  # ids from here on are decoded together, so that spaces between tokens come out right
        self._decoded = len(self._ids)  # ids before this have become text
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
        before = _decode(self._tokenizer, self._ids[self._context : self._decoded])
        after = _decode(self._tokenizer, self._ids[self._context :])
        if len(after) <= len(before) or after.endswith(INCOMPLETE):
            return ""
        self._context, self._decoded = self._decoded, len(self._ids)
        return self._release(_added(before, after))

    def finish(self) -> str:
        """No token follows: what was held back, incomplete characters included."""
        if self.stopped:
            return ""
        before = _decode(self._tokenizer, self._ids[self._context : self._decoded])
        after = _decode(self._tokenizer, self._ids[self._context :])
        text = self._release(_added(before, after))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

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


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""


def _added(before: str, after: str) -> str:
    """What `after` has behind `before`, whose end may have been a part of a character."""
    if after.startswith(before):
        return after[len(before) :]
    shared = next((n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
    return after[shared:]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
