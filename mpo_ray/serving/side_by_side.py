"""The completions of one HTTP request, decoded side by side by one engine, as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from mpo_ray.decoding.pace import joined
from mpo_ray.decoding.protocol import Delta, Engine, GenerationRequest, every_token

#: What was added to completions: the number of each, and its delta.
Batch = list[tuple[int, Delta]]
#: Makes all completions of an HTTP request, in one place; leaving the iterator ends those unfinished.
Generate = Callable[[Sequence[GenerationRequest]], AsyncGenerator[Batch]]


async def side_by_side(
    engine: Engine, requests: Sequence[GenerationRequest], *, tokens_per_delta: Callable[[], float] = every_token
) -> AsyncGenerator[Batch]:
    """Yield what is added to any of the completions, numbered as the requests are; each at most once in a batch.

    tokens_per_delta: as the engine's. Raises what the engine raises, for the first completion that fails; the others
    are then aborted.
    """
    inbox = _Inbox()

    async def pump(number: int, request: GenerationRequest) -> None:
        try:
            async with aclosing(engine.generate(request, tokens_per_delta)) as deltas:  # type: ignore[type-var]
                async for delta in deltas:
                    inbox.put(number, delta)
        except Exception as error:
            inbox.fail(error)

    tasks = [asyncio.create_task(pump(number, request)) for number, request in enumerate(requests)]
    unfinished = len(tasks)
    try:
        while unfinished:
            batch, error = await inbox.take()
            unfinished -= sum(delta.finish_reason is not None for _, delta in batch)
            if batch:
                yield batch
            if error is not None:
                raise error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Inbox:
    """What has come and was not taken yet."""

    def __init__(self) -> None:
        self._deltas: dict[int, list[Delta]] = {}
        self._error: Exception | None = None
        self._wake = asyncio.Event()

    def put(self, number: int, delta: Delta) -> None:
        self._deltas.setdefault(number, []).append(delta)
        self._wake.set()

    def fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._wake.set()

    async def take(self) -> tuple[Batch, Exception | None]:
        await self._wake.wait()
        self._wake.clear()
        deltas, self._deltas = self._deltas, {}
        return [(number, joined(several)) for number, several in deltas.items()], self._error
