"""An engine that is stuck in a step is found, refuses what comes, and keeps nobody waiting."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from mpo_ray.decoding.engine_thread import EngineThread
from mpo_ray.decoding.open_engine import open_engine
from mpo_ray.decoding.protocol import EngineError, GenerationRequest, Sampling
from tests.serving.served import write_mixture


def test_a_stuck_step_makes_the_engine_unhealthy_and_ends_what_waits_for_it(tmp_path: Path) -> None:
    engine = open_engine(str(write_mixture(tmp_path)), max_num_seqs=2)
    stuck, go_on, step = threading.Event(), threading.Event(), engine.step

    def stopping() -> Any:
        stuck.set()
        go_on.wait(20)
        return step()

    engine.step = stopping  # type: ignore[method-assign]
    thread = EngineThread(engine, stuck_after=0.2)

    async def ask(name: str) -> None:
        async for _ in thread.generate(GenerationRequest(name, (1, 7), Sampling(max_tokens=4))):
            pass

    async def watch() -> None:
        waiting = asyncio.create_task(ask("in the step"))
        await asyncio.to_thread(stuck.wait, 10)
        later = asyncio.create_task(ask("for the next step"))
        thread.check_health()  # not yet
        await asyncio.sleep(0.3)
        with pytest.raises(EngineError, match="in one step for 0 s"):
            thread.check_health()
        for task in (waiting, later):
            with pytest.raises(EngineError, match="in one step"):
                await asyncio.wait_for(task, 5)
        with pytest.raises(EngineError, match="in one step"):
            await ask("too late")

    asyncio.run(watch())
    go_on.set()
    thread.close()
    with pytest.raises(EngineError, match="in one step"):
        thread.check_health()
