"""Server-sent events: an answer as it grows, while the client is there and the time lasts."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mpo_ray.serving.answers import Bodies, usage_of
from mpo_ray.serving.errors import api_error_of, unexpected
from mpo_ray.serving.gate import passage_of
from mpo_ray.serving.generation import Pieces

logger = logging.getLogger(__name__)
T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, but end it, and raise ClientGoneError, as soon as the client has left. The body was received."""

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, leaving = asyncio.create_task(work), asyncio.create_task(leave())
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGoneError
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


class EventStream(Response):
    """Sends events until they end, the client has left, or the deadline (of the event loop's clock) has come.

    source: what the events are made of; it is closed with them
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], source: AsyncGenerator[Pieces], deadline: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._source, self._deadline = events, source, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await while_connected(receive, self._send(scope, send))
        except ClientGoneError:
            return
        finally:
            await self._events.aclose()
            await self._source.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, scope: Scope, send: Send) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                async for event in self._events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:  # the status was sent long ago: the stream itself has to say it
            known = api_error_of(error)
            if known is None:
                logger.exception("the stream of request %s failed", passage_of(scope).id)
                known = unexpected(passage_of(scope).id)
            await send({"type": "http.response.body", "body": event_of(known.body()), "more_body": True})


async def events_of(
    bodies: Bodies,
    first: Pieces,
    rest: AsyncIterator[Pieces],
    *,
    num_choices: int,
    prompt_tokens: int,
    include_usage: bool,
    continuous_usage: bool,
) -> AsyncGenerator[bytes]:
    """A chunk per piece that has something to say, usage if it is wanted, then `[DONE]`."""
    num_tokens = 0

    def chunk(body: dict[str, Any]) -> bytes:
        if include_usage:
            body["usage"] = usage_of(prompt_tokens, num_tokens) if continuous_usage else None
        return event_of(body)

    for index in range(num_choices):
        if (opening := bodies.opening(index)) is not None:
            yield chunk(opening)
    async for pieces in chain(first, rest):
        for number, piece in pieces:
            num_tokens += piece.num_tokens
            if piece.text or piece.entries or piece.finish_reason:
                yield chunk(bodies.chunk(number, piece))
    if include_usage:
        yield event_of(bodies.ending() | {"usage": usage_of(prompt_tokens, num_tokens)})
    yield b"data: [DONE]\n\n"


async def chain(first: Pieces, rest: AsyncIterator[Pieces]) -> AsyncIterator[Pieces]:
    yield first
    async for pieces in rest:
        yield pieces


def event_of(body: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False)}\n\n".encode()
