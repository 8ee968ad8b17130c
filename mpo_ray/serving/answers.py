"""The bodies of one request's answer, whole or in chunks, in OpenAI's form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from mpo_ray.decoding.protocol import Diagnostics
from mpo_ray.serving.answer_types import (
    ChatAnswer,
    ChatChoice,
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    MixtureReport,
    Usage,
)
from mpo_ray.serving.choices import Piece, TokenEntry

#: What OpenAI writes for a log-probability that no number says (−∞).
IMPOSSIBLE = -9999.0


class CompletionBodies:
    """Bodies of /v1/completions."""

    def __init__(self, id: str, created: int, model: str) -> None:
        self._id, self._created, self._model = f"cmpl-{id}", created, model

    def whole(self, choices: Sequence[Piece], usage: Usage) -> CompletionAnswer:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": usage,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """A completion opens with its first piece."""
        return None

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "text": piece.text,
            "logprobs": None if piece.entries is None else completion_logprobs(piece.entries),
            "finish_reason": piece.finish_reason,
        }
        return self.ending() | {"choices": [choice | _ending_of(piece)]}

    def ending(self) -> dict[str, Any]:
        """A chunk without choices."""
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": [],
        }

    @staticmethod
    def _choice(index: int, piece: Piece) -> CompletionChoice:
        assert piece.finish_reason is not None
        return {
            "index": index,
            "text": piece.text,
            "logprobs": None if piece.entries is None else completion_logprobs(piece.entries),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop,
            "mixture": mixture_report(piece.diagnostics),
        }


class ChatBodies:
    """Bodies of /v1/chat/completions."""

    def __init__(self, id: str, created: int, model: str) -> None:
        self._id, self._created, self._model = f"chatcmpl-{id}", created, model

    def whole(self, choices: Sequence[Piece], usage: Usage) -> ChatAnswer:
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": usage,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that says who speaks."""
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = None if piece.entries is None else chat_logprobs(piece.entries)
        body = self._delta(index, {"content": piece.text} if piece.text else {}, logprobs, piece.finish_reason)
        body["choices"][0] |= _ending_of(piece)
        return body

    def ending(self) -> dict[str, Any]:
        """A chunk without choices."""
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": [],
        }

    def _delta(
        self, index: int, delta: dict[str, str], logprobs: ChatLogprobs | None, finish_reason: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self.ending() | {"choices": [choice]}

    @staticmethod
    def _choice(index: int, piece: Piece) -> ChatChoice:
        assert piece.finish_reason is not None
        return {
            "index": index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": None if piece.entries is None else chat_logprobs(piece.entries),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop,
            "mixture": mixture_report(piece.diagnostics),
        }


Bodies = CompletionBodies | ChatBodies


def usage_of(prompt_tokens: int, completion_tokens: int) -> Usage:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def mixture_report(diagnostics: Diagnostics | None) -> MixtureReport:
    """`mixture` of a choice."""
    assert diagnostics is not None, "a completion ends with its diagnostics"
    mode: Literal["token", "exact"] = "token" if diagnostics.mode == "token" else "exact"
    method: Literal["smc", "rejection"] = "smc" if diagnostics.mode == "smc" else "rejection"
    return {
        "mode": mode,
        "method": None if mode == "token" else method,
        "weights": dict(diagnostics.weights),
        "log_z": _finite(diagnostics.log_z),
        "log_z_hat": _finite(diagnostics.log_z_hat),
        "effective_sample_size": _finite(diagnostics.effective_sample_size),
        "particles": diagnostics.particles,
        "attempts": diagnostics.attempts,
    }


def completion_logprobs(entries: Sequence[TokenEntry]) -> CompletionLogprobs:
    logprobs: CompletionLogprobs = {
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [None if entry.logprob is None else _number(entry.logprob) for entry in entries],
        "top_logprobs": [None if entry.logprob is None else _by_text(entry) for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }
    if any(entry.by_policy is not None for entry in entries):
        logprobs["policy_logprobs"] = [_policies(entry) for entry in entries]
        logprobs["log_z"] = [_finite(entry.log_z) for entry in entries]
    return logprobs


def chat_logprobs(entries: Sequence[TokenEntry]) -> ChatLogprobs:
    return {"content": [_chat_entry(entry) for entry in entries], "refusal": None}


def _chat_entry(entry: TokenEntry) -> ChatTokenLogprob:
    assert entry.logprob is not None, "a chat is not echoed"
    body: ChatTokenLogprob = {
        "token": entry.text,
        "logprob": _number(entry.logprob),
        "bytes": entry.bytes,
        "top_logprobs": [{"token": text, "logprob": _number(value), "bytes": raw} for text, raw, value in entry.top],
    }
    if entry.by_policy is not None:
        body["policy_logprobs"] = _policies(entry)
        body["log_z"] = _finite(entry.log_z)
    return body


def _by_text(entry: TokenEntry) -> dict[str, float]:
    """The likeliest tokens and the drawn one, by their text; where two have one text, the drawn one's value counts."""
    found: dict[str, float] = {}
    for text, _, value in entry.top:
        found.setdefault(text, _number(value))
    assert entry.logprob is not None
    found[entry.text] = _number(entry.logprob)
    return found


def _ending_of(piece: Piece) -> dict[str, Any]:
    """What only the last chunk of a choice has."""
    if piece.finish_reason is None:
        return {}
    return {"stop_reason": piece.stop, "mixture": mixture_report(piece.diagnostics)}


def _policies(entry: TokenEntry) -> dict[str, float] | None:
    return None if entry.by_policy is None else {name: _number(value) for name, value in entry.by_policy.items()}


def _number(value: float) -> float:
    return value if math.isfinite(value) else IMPOSSIBLE


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
