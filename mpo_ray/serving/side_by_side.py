"""The completions of one HTTP request, decoded side by side by one engine, as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from mpo_ray.decoding.protocol import Delta, Engine, GenerationRequest

#: What was added to completions: the number of each, and its delta.
Batch = list[tuple[int, Delta]]
#: Makes all completions of an HTTP request, in one place; leaving the iterator ends those unfinished.
Generate = Callable[[Sequence[GenerationRequest]], AsyncGenerator[Batch]]


async def side_by_side(
    engine: Engine, requests: Sequence[GenerationRequest], *, interval: float = 0.0
) -> AsyncGenerator[Batch]:
    """Yield what is added to any of the completions, numbered as the requests are.

    interval: seconds between two batches, at least, once each completion has its first token: fewer and larger ones
    Raises what the engine raises, for the first completion that fails; the others are then aborted.
    """
    queue: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue()

    async def pump(number: int, request: GenerationRequest) -> None:
        try:
            async with aclosing(engine.generate(request)) as deltas:  # type: ignore[type-var]
                async for delta in deltas:
                    queue.put_nowait((number, delta))
        except Exception as error:
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(pump(number, request)) for number, request in enumerate(requests)]
    unfinished, unheard = len(tasks), {*range(len(tasks))}
    try:
        while unfinished:
            items = [await queue.get()]
            if interval and not unheard:
                await asyncio.sleep(interval)
            while not queue.empty():
                items.append(queue.get_nowait())
            batch: Batch = []
            for number, item in items:
                if isinstance(item, Exception):
                    if batch:
                        yield batch
                    raise item
                unheard.discard(number)
                unfinished -= item.finish_reason is not None
                batch.append((number, item))
            yield batch
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
