"""Asking the engine for the completions of one HTTP request: pieces of choices, as they come, and who hears of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from mpo_ray.decoding.protocol import GenerationRequest
from mpo_ray.serving.choices import Choice, Piece
from mpo_ray.serving.errors import api_error_of
from mpo_ray.serving.gate import Passage
from mpo_ray.serving.observer import Observer
from mpo_ray.serving.side_by_side import Generate

Pieces = list[tuple[int, Piece]]


async def generation(
    generate: Generate,
    requests: Sequence[GenerationRequest],
    choices: Sequence[Choice],
    passage: Passage,
    observer: Observer,
    deadline: float,
) -> AsyncGenerator[Pieces]:
    """Yield what is added to the choices, by their numbers. Leaving it ends them. Raises what `generate` does.

    deadline: of the event loop's clock; who awaits the iterator keeps it, and here it only says why an end came
    """
    unfinished, unheard = {request.id: None for request in requests}, {*range(len(requests))}
    now = time.monotonic()
    for request in requests:
        observer.request_admitted(request.id, len(request.prompt_ids), now)
    passage.admitted = True
    reason = "disconnected"
    try:
        async with aclosing(generate(requests)) as batches:
            async for batch in batches:
                now, pieces = time.monotonic(), []
                for number, delta in batch:
                    id = requests[number].id
                    if delta.tokens:
                        if number in unheard:
                            unheard.discard(number)
                            observer.first_token(id, now)
                        observer.tokens(id, len(delta.tokens), now)
                        passage.tokens += len(delta.tokens)
                    if delta.finish_reason is not None:
                        unfinished.pop(id, None)
                        observer.finished(id, delta.finish_reason, delta.diagnostics, now)
                    pieces.append((number, choices[number].add(delta)))
                yield pieces
    except Exception as error:
        known = api_error_of(error)
        reason = "500" if known is None else known.code or str(known.status)
        raise
    except asyncio.CancelledError:
        if asyncio.get_running_loop().time() >= deadline:
            reason = "request_timeout"
        raise
    finally:
        now = time.monotonic()
        for id in unfinished:
            observer.aborted(id, reason, now)
