"""What a replica tells the ingress, as plain tuples: a message for each batch, small because there are very many.

Errors travel as values: what Ray makes of an exception on its way would have to be taken apart again.
"""

from __future__ import annotations

import pickle
from typing import Any

from mpo_ray.decoding.protocol import (
    Delta,
    EngineError,
    NothingAcceptedError,
    QueueFullError,
    RequestError,
    Statistics,
)
from mpo_ray.serving.side_by_side import Batch


class OtherArtefactError(RuntimeError):
    """The replica serves an artefact of another vocabulary, objectives or context than the ingress knows."""


#: Errors that the ingress has to tell apart; any other is an EngineError to it, and its text stays in the log.
ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (RequestError, QueueFullError, NothingAcceptedError, EngineError, OtherArtefactError)
}


def pack_batch(batch: Batch, replica: str, statistics: Statistics) -> bytes:
    """A batch, with the replica's name and where its engine stands."""
    return pickle.dumps(
        (
            [(number, delta.tokens, delta.text, delta.finish_reason, _rest(delta)) for number, delta in batch],
            replica,
            _values(statistics),
        ),
        protocol=5,
    )


def pack_error(error: Exception) -> bytes:
    """An error in the place of a batch."""
    if isinstance(error, RequestError):
        return pickle.dumps(("RequestError", (error.message, error.param)))
    for name, kind in ERRORS.items():
        if isinstance(error, kind):
            return pickle.dumps((name, (str(error),)))
    return pickle.dumps(("EngineError", (f"{type(error).__name__} while decoding",)))


def unpack(message: bytes) -> tuple[Batch, str, Statistics]:
    """The batch, the replica's name and its statistics. Raises the error, if it is one."""
    content: Any = pickle.loads(message)  # noqa: S301 — of our own replica
    if isinstance(content[0], str):
        raise ERRORS[content[0]](*content[1])
    rows, replica, numbers = content
    batch = [
        (number, Delta(tokens, text, finish_reason=reason, **(rest or {})))
        for number, tokens, text, reason, rest in rows
    ]
    return batch, replica, Statistics(*numbers)


def _rest(delta: Delta) -> dict[str, Any] | None:
    """What few deltas have."""
    values = {name: getattr(delta, name) for name in ("logprobs", "prompt_logprobs", "stop", "diagnostics")}
    return {name: value for name, value in values.items() if value not in ((), None)} or None


def _values(statistics: Statistics) -> tuple[float, ...]:
    return tuple(getattr(statistics, name) for name in Statistics.__slots__)
