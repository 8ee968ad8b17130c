"""One choice of an answer as it grows: pieces of text with the log-probabilities of their tokens.

A plain answer is its pieces joined, so that it cannot differ from what a stream says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpo_ray.decoding.protocol import Delta, Diagnostics, FinishReason, TokenLogprob
from mpo_ray.decoding.text_stream import CONTEXT, TextStream, tail
from mpo_ray.serving.token_text import TokenText


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """A token as an answer names it. offset: place in the choice's text; logprob: None for a prompt's first token.

    top: text, bytes and log-probability of the likeliest tokens
    """

    text: str
    bytes: list[int]
    offset: int
    logprob: float | None = None
    top: Sequence[tuple[str, list[int], float]] = ()
    by_policy: Mapping[str, float] | None = None
    log_z: float | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What was added to a choice. entries: None where no log-probabilities are wanted; the last piece has the rest."""

    text: str
    entries: list[TokenEntry] | None
    num_tokens: int
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    diagnostics: Diagnostics | None = None

    @classmethod
    def joined(cls, pieces: Sequence[Piece]) -> Piece:
        """All pieces of a choice as one."""
        last = pieces[-1]
        return cls(
            "".join(piece.text for piece in pieces),
            None if last.entries is None else [entry for piece in pieces for entry in piece.entries or ()],
            sum(piece.num_tokens for piece in pieces),
            last.finish_reason,
            last.stop,
            last.diagnostics,
        )


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is repeated in front of its completions."""

    text: str
    ids: tuple[int, ...]


class Choice:
    """Turns the deltas of one completion into pieces of a choice.

    prompt_ids: of the text that the completion continues, none for a reply; echo: where that text is repeated
    """

    def __init__(
        self,
        tokenizer: Any,
        token_text: TokenText,
        *,
        prompt_ids: Sequence[int] = (),
        echo: Echo | None,
        with_logprobs: bool,
    ) -> None:
        self._tokenizer, self._token_text = tokenizer, token_text
        self._echo, self._with_logprobs = echo, with_logprobs
        self._begun = False
        self._ids = tail(tokenizer, prompt_ids)
        self._places = _Places(tokenizer, 0 if echo is None else len(echo.text), prompt_ids)

    def add(self, delta: Delta) -> Piece:
        text = delta.text
        entries: list[TokenEntry] | None = [] if self._with_logprobs else None
        if not self._begun and self._echo is not None:
            text = self._echo.text + text
            if entries is not None:
                entries += self._prompt_entries(self._echo, delta.prompt_logprobs or ())
        self._begun = True
        if entries is not None:
            for logprob in delta.logprobs:
                entries.append(self._entry(logprob.token, logprob, self._ids[-CONTEXT:], self._places))
                self._ids.append(logprob.token)
        return Piece(text, entries, len(delta.tokens), delta.finish_reason, delta.stop, delta.diagnostics)

    def _prompt_entries(self, echo: Echo, logprobs: Sequence[TokenLogprob | None]) -> list[TokenEntry]:
        places = _Places(self._tokenizer, 0)
        entries = []
        for number, (token, logprob) in enumerate(zip(echo.ids, logprobs, strict=True)):
            before = echo.ids[max(0, number - CONTEXT) : number]
            entries.append(self._entry(token, logprob, before, places))
        return entries

    def _entry(self, token: int, logprob: TokenLogprob | None, before: Sequence[int], places: _Places) -> TokenEntry:
        text, raw = self._token_text.of(token, before)
        place = places.next(token, text)
        if logprob is None:
            return TokenEntry(text, raw, place)
        top = [(*self._token_text.of(one, before), value) for one, value in logprob.top]
        return TokenEntry(text, raw, place, logprob.logprob, top, logprob.by_policy, logprob.log_z)


class _Places:
    """Where each token's text begins, in a text that grows token by token."""

    def __init__(self, tokenizer: Any, start: int, prompt_ids: Sequence[int] = ()) -> None:
        self._stream, self._end = TextStream(tokenizer, prompt_ids=prompt_ids), start

    def next(self, token: int, text: str) -> int:
        """text: the token's own, at the end of what it adds, unless it is a part of a character"""
        before, added = self._end, self._stream.push(token)
        self._end += len(added)
        return self._end - len(text) if text and added.endswith(text) else before
