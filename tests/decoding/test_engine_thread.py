"""The engine behind the protocol: its thread decodes, the event loop stays free, who leaves frees what was held."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from mpo_ray.decoding.engine import Event
from mpo_ray.decoding.engine_thread import EngineThread
from mpo_ray.decoding.protocol import Delta, EngineError, GenerationRequest, QueueFullError, RequestError
from tests.decoding.mixtures import PROMPTS, completed, engine_of, request, tokens


def with_thread(artefact: Path, work: Callable[[EngineThread], Coroutine[Any, Any, None]], **settings: Any) -> None:
    engine = EngineThread(engine_of(artefact, **settings))
    try:
        asyncio.run(work(engine))
    finally:
        engine.close()


async def everything(deltas: AsyncIterator[Delta]) -> list[Delta]:
    return [delta async for delta in deltas]


def long_request(number: int) -> GenerationRequest:
    return request(number, PROMPTS[number % 4], ignore_eos=True, max_tokens=50)


def test_what_comes_through_the_thread_is_what_the_engine_gives(artefacts: dict[str, Path]) -> None:
    """From two event loops in two threads at a time."""
    asked = [request(n, PROMPTS[n % 4], temperature=1.0, seed=n) for n in range(8)]
    expected = completed(engine_of(artefacts["lora"]), asked)
    engine = EngineThread(engine_of(artefacts["lora"]))
    found: dict[str, list[Delta]] = {}

    async def some(requests: list[GenerationRequest]) -> None:
        results = await asyncio.gather(*(everything(engine.generate(one)) for one in requests))
        found.update({one.id: deltas for one, deltas in zip(requests, results, strict=True)})

    threads = [threading.Thread(target=lambda part=part: asyncio.run(some(part))) for part in (asked[:4], asked[4:])]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    assert [tokens(found[one.id]) for one in asked] == [tokens(deltas) for deltas in expected]


def test_tokens_are_told_several_at_a_time_where_that_is_wanted(artefacts: dict[str, Path]) -> None:
    """The first at once, then seven by seven, and the last with what is left: the same tokens and text."""

    async def work(engine: EngineThread) -> None:
        each = await everything(engine.generate(long_request(0)))
        some = await everything(engine.generate(long_request(0), lambda: 7.0))
        assert [len(delta.tokens) for delta in some] == [1, *[7] * 7]
        assert tokens(some) == tokens(each)
        assert "".join(delta.text for delta in some) == "".join(delta.text for delta in each)
        assert some[-1].diagnostics == each[-1].diagnostics

    with_thread(artefacts["lora"], work)


def test_requests_of_one_turn_of_the_loop_begin_in_one_step(artefacts: dict[str, Path]) -> None:
    """Though the thread has time for many steps between them: so a request's completions are computed together."""
    engine = engine_of(artefacts["lora"])
    running: list[int] = []
    step = engine.step

    def watched() -> list[Event]:
        events = step()
        running.append(len({id for id, _ in events}))
        return events

    engine.step = watched  # type: ignore[method-assign]
    thread = EngineThread(engine)

    async def dawdle() -> None:
        time.sleep(0.2)  # holds the loop, not the engine

    async def work() -> None:
        first, second = (everything(thread.generate(long_request(number))) for number in range(2))
        await asyncio.gather(first, dawdle(), second)

    try:
        asyncio.run(work())
    finally:
        thread.close()
    assert [number for number in running if number] == [2] * 50


def test_the_event_loop_is_free_while_tokens_are_decoded(artefacts: dict[str, Path]) -> None:
    async def work(engine: EngineThread) -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        deltas = await everything(engine.generate(long_request(0)))
        ticking.cancel()
        assert ticks > len(deltas)

    with_thread(artefacts["lora"], work)


def test_who_leaves_frees_its_rows_within_a_step(artefacts: dict[str, Path]) -> None:
    """By leaving the iterator, by cancelling its task, and by `abort`: long before the 50 tokens are decoded."""

    async def work(engine: EngineThread) -> None:
        async with aclosing(engine.generate(long_request(0))) as deltas:  # type: ignore[type-var]
            await anext(deltas)
            assert engine.statistics().kv_blocks_used == 3
        cancelled = asyncio.create_task(everything(engine.generate(long_request(1))))
        ended = asyncio.create_task(everything(engine.generate(long_request(2))))
        while engine.statistics().running < 2:
            await asyncio.sleep(0.001)
        cancelled.cancel()
        await engine.abort("2")
        await engine.abort("nobody")
        partial = await ended
        assert all(delta.finish_reason is None for delta in partial)
        end = time.monotonic() + 5
        while engine.statistics().kv_blocks_used and time.monotonic() < end:
            await asyncio.sleep(0.001)
        now = engine.statistics()
        assert (now.running, now.kv_blocks_used, now.aborted) == (0, 0, 3)
        assert now.generated_tokens < 100

    with_thread(artefacts["lora"], work)


def test_refusals_come_before_the_first_token(artefacts: dict[str, Path]) -> None:
    async def work(engine: EngineThread) -> None:
        with pytest.raises(RequestError, match="not in the vocabulary"):
            await everything(engine.generate(request(0, (1, 999))))
        running = []
        for number in range(1, 4):
            running.append(asyncio.create_task(everything(engine.generate(long_request(number)))))
            while not engine.statistics().running or engine.statistics().waiting < number - 1:
                await asyncio.sleep(0.001)
        with pytest.raises(QueueFullError, match="2 requests are waiting"):
            await everything(engine.generate(long_request(4)))
        assert [len(tokens(deltas)) for deltas in await asyncio.gather(*running)] == [50] * 3

    with_thread(artefacts["lora"], work, max_num_seqs=1, max_waiting=2)


def test_an_engine_that_breaks_tells_everyone_who_waits_and_takes_nobody_new(artefacts: dict[str, Path]) -> None:
    async def work(engine: EngineThread) -> None:
        def broken() -> list[Any]:
            raise MemoryError("no room")

        engine._engine.step = broken  # type: ignore[method-assign]
        for number in range(2):
            with pytest.raises(EngineError, match="ended after an error"):
                await everything(engine.generate(long_request(number)))
        with pytest.raises(EngineError, match="ended after an error"):
            engine.check_health()

    with_thread(artefacts["lora"], work)


def test_what_was_held_comes_before_the_error(artefacts: dict[str, Path]) -> None:
    async def work(engine: EngineThread) -> None:
        step, steps = engine._engine.step, 0

        def breaking() -> list[Any]:
            nonlocal steps
            steps += 1
            if steps > 5:
                raise MemoryError("no room")
            return step()

        engine._engine.step = breaking  # type: ignore[method-assign]
        found: list[int] = []

        async def hear() -> None:
            async for delta in engine.generate(long_request(0), lambda: 10.0):
                found.extend(delta.tokens)

        with pytest.raises(EngineError, match="ended after an error"):
            await hear()
        assert len(found) == 5

    with_thread(artefacts["lora"], work)


def test_closing_ends_what_is_decoded(artefacts: dict[str, Path]) -> None:
    async def work(engine: EngineThread) -> None:
        running = asyncio.create_task(everything(engine.generate(long_request(0))))
        while not engine.statistics().running:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineError, match="closed"):
            await running

    with_thread(artefacts["lora"], work)


def test_closing_ends_what_was_not_handed_in_yet(artefacts: dict[str, Path]) -> None:
    async def work(engine: EngineThread) -> None:
        asked = asyncio.create_task(everything(engine.generate(long_request(0))))
        await asyncio.sleep(0)  # it is handed in when this turn of the loop ends
        engine.close()
        with pytest.raises(EngineError, match="closed"):
            await asyncio.wait_for(asked, 10)

    with_thread(artefacts["lora"], work)
