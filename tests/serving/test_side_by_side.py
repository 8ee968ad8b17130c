"""Completions side by side as one stream: nothing is lost, first tokens and ends do not wait, and errors arrive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from mpo_ray.decoding.pace import Pace
from mpo_ray.decoding.protocol import (
    Delta,
    Diagnostics,
    EngineError,
    GenerationRequest,
    QueueFullError,
    RequestError,
    Sampling,
    Statistics,
    TokenLogprob,
    every_token,
)
from mpo_ray.serving.side_by_side import Batch, side_by_side
from mpo_ray.serving.wire import OtherArtefactError, pack_batch, pack_error, unpack

STANDING = Statistics(running=1, waiting=2, kv_blocks=6, kv_blocks_used=3, admitted=4, queue_seconds=0.5)


class Ticking:
    """An engine that makes one token after the other, `step` seconds apart; `wrong` fails after three."""

    def __init__(self, step: float, num_tokens: int) -> None:
        self._step, self._num_tokens = step, num_tokens

    async def generate(
        self, request: GenerationRequest, tokens_per_delta: Callable[[], float] = every_token
    ) -> AsyncIterator[Delta]:
        pace = Pace(tokens_per_delta)
        for token in range(self._num_tokens):
            if request.id == "wrong" and token == 3:
                if (rest := pace.rest()) is not None:
                    yield rest
                raise EngineError("broken")
            last = token == self._num_tokens - 1
            if (told := pace.add(Delta((token,), f"{token} ", finish_reason="length" if last else None))) is not None:
                yield told
            await asyncio.sleep(self._step)


async def batches_of(engine: Any, ids: list[str], tokens: float) -> tuple[list[Batch], list[float]]:
    requests = [GenerationRequest(one, (1,), Sampling(max_tokens=9)) for one in ids]
    found, times, began = [], [], time.monotonic()
    async for batch in side_by_side(engine, requests, tokens_per_delta=lambda: tokens):
        found.append(batch)
        times.append(time.monotonic() - began)
    return found, times


def test_more_tokens_per_delta_make_fewer_batches_of_the_same_text_and_delay_neither_first_nor_last() -> None:
    every, _ = asyncio.run(batches_of(Ticking(0.02, 20), ["a", "b"], 1.0))
    few, times = asyncio.run(batches_of(Ticking(0.02, 20), ["a", "b"], 7.0))
    for found in (every, few):
        for number in (0, 1):
            deltas = [delta for batch in found for one, delta in batch if one == number]
            assert "".join(delta.text for delta in deltas) == "".join(f"{token} " for token in range(20))
            assert [token for delta in deltas for token in delta.tokens] == list(range(20))
            assert [delta.finish_reason for delta in deltas][-1] == "length"
    assert len(few) <= 6 < 15 < len(every)
    assert times[0] < 0.1  # at once, though seven tokens take longer
    assert few[-1][0][1].finish_reason == "length"


def test_what_came_before_an_error_comes_before_it() -> None:
    async def collect() -> list[int]:
        found = []
        request = GenerationRequest("wrong", (1,), Sampling(max_tokens=9))
        try:
            async for batch in side_by_side(Ticking(0.0, 9), [request], tokens_per_delta=lambda: 10.0):
                found += [token for _, delta in batch for token in delta.tokens]
        except EngineError:
            found.append(-1)
        return found

    assert asyncio.run(collect()) == [0, 1, 2, -1]


def test_a_batch_on_the_wire_is_the_batch() -> None:
    logprob = TokenLogprob(5, -0.5, ((5, -0.5), (6, -1.0)), {"helpful": -0.4}, -0.1)
    rich = Delta((5,), "x", (logprob,), (None, logprob), "stop", "END", Diagnostics("token", {"helpful": 1.0}, -2.0))
    batch = [(0, Delta((1, 2), "é")), (3, rich), (1, Delta())]
    assert unpack(pack_batch(batch, "one", STANDING)) == (batch, "one", STANDING)


def test_errors_on_the_wire_keep_their_kind_and_strange_ones_keep_their_text_to_themselves() -> None:
    with pytest.raises(RequestError, match="too hot") as caught:
        unpack(pack_error(RequestError("too hot", "temperature")))
    assert caught.value.param == "temperature"
    for error in (QueueFullError("full"), EngineError("ended"), OtherArtefactError("other")):
        with pytest.raises(type(error), match=str(error)):
            unpack(pack_error(error))
    with pytest.raises(EngineError, match=r"^KeyError while decoding$"):
        unpack(pack_error(KeyError("/secret/path")))
