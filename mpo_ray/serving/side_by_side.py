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
#: Seconds that a token waits for others, at most.
LONGEST_WAIT = 0.5


async def side_by_side(
    engine: Engine, requests: Sequence[GenerationRequest], *, tokens_per_batch: Callable[[], float] = lambda: 1.0
) -> AsyncGenerator[Batch]:
    """Yield what is added to any of the completions, numbered as the requests are; each at most once in a batch.

    tokens_per_batch: of each unfinished completion, at least, asked after each batch: more make fewer and larger
    ones. First tokens, ends and errors do not wait for others, and nothing waits longer than `LONGEST_WAIT`.
    Raises what the engine raises, for the first completion that fails; the others are then aborted.
    """
    inbox = _Inbox(len(requests), tokens_per_batch)

    async def pump(number: int, request: GenerationRequest) -> None:
        try:
            async with aclosing(engine.generate(request)) as deltas:  # type: ignore[type-var]
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
        inbox.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Inbox:
    """What has come and was not taken yet."""

    def __init__(self, num_completions: int, tokens_per_batch: Callable[[], float]) -> None:
        self._loop, self._tokens_per_batch = asyncio.get_running_loop(), tokens_per_batch
        self._deltas: dict[int, list[Delta]] = {}
        self._error: Exception | None = None
        self._unheard, self._unfinished = {*range(num_completions)}, num_completions
        self._num_tokens, self._wanted = 0, 1.0
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    def put(self, number: int, delta: Delta) -> None:
        self._deltas.setdefault(number, []).append(delta)
        self._num_tokens += len(delta.tokens)
        urgent = delta.finish_reason is not None or number in self._unheard
        self._unheard.discard(number)
        self._unfinished -= delta.finish_reason is not None
        if urgent or self._num_tokens >= self._wanted:
            self._wake.set()
        elif self._timer is None:
            self._timer = self._loop.call_later(LONGEST_WAIT, self._wake.set)

    def fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._wake.set()

    async def take(self) -> tuple[Batch, Exception | None]:
        await self._wake.wait()
        self._wake.clear()
        self.close()
        deltas, self._deltas = self._deltas, {}
        self._num_tokens, self._wanted = 0, self._unfinished * self._tokens_per_batch()
        return [(number, joined(several)) for number, several in deltas.items()], self._error

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def joined(deltas: Sequence[Delta]) -> Delta:
    """Deltas of one completion that follow each other, as one."""
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    return Delta(
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        text="".join(delta.text for delta in deltas),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None),
        finish_reason=last.finish_reason,
        stop=last.stop,
        diagnostics=last.diagnostics,
    )
