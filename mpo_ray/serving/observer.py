"""What an endpoint tells whoever watches it: moments of completions, for metrics. Never what they say."""

from __future__ import annotations

from typing import Protocol

from mpo_ray.decoding.protocol import Diagnostics


class Observer(Protocol):
    """Hears of every completion, on the event loop: return at once, and raise nothing.

    id: of the completion (`GenerationRequest.id`); at: seconds of the monotonic clock
    Each completion that is admitted ends in exactly one of `finished` and `aborted`.
    """

    def request_admitted(self, id: str, prompt_tokens: int, at: float) -> None:
        """It is handed to the engine, where it may wait."""

    def first_token(self, id: str, at: float) -> None: ...

    def tokens(self, id: str, count: int, at: float) -> None:
        """`count` tokens came, the first one too."""

    def finished(self, id: str, reason: str, diagnostics: Diagnostics | None, at: float) -> None: ...

    def aborted(self, id: str, reason: str, at: float) -> None:
        """It ended before its end: `disconnected`, `request_timeout`, or the code of an error."""

    def rejected(self, reason: str, at: float) -> None:
        """An HTTP request was refused: the error's code, or its status."""


class Unobserved:
    """Hears everything and does nothing."""

    def request_admitted(self, id: str, prompt_tokens: int, at: float) -> None:
        pass

    def first_token(self, id: str, at: float) -> None:
        pass

    def tokens(self, id: str, count: int, at: float) -> None:
        pass

    def finished(self, id: str, reason: str, diagnostics: Diagnostics | None, at: float) -> None:
        pass

    def aborted(self, id: str, reason: str, at: float) -> None:
        pass

    def rejected(self, reason: str, at: float) -> None:
        pass
