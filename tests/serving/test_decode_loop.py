"""The loop that decodes all requests on one thread: turns, cancelling, errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.serving.decode_loop import DecodeLoop, Generation
from tests.tiny import tiny_llama, tiny_tokenizer

OBJECTIVES = ("helpful", "harmless")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> MixtureForCausalLM:
    root = tmp_path_factory.mktemp("mixture")
    tokenizer = tiny_tokenizer()
    write_artefact(
        root / "mixture",
        objectives={name: tiny_llama(root / name, tokenizer, seed) for seed, name in enumerate(OBJECTIVES)},
        reference=tiny_llama(root / "reference", tokenizer, seed=9, max_position_embeddings=4096),
        copy_reference=False,
        weights={"helpful": 0.5, "harmless": 0.5},
        fit={},
    )
    return MixtureForCausalLM.from_pretrained(root / "mixture")


def with_loop(mixture: MixtureForCausalLM, work: Callable[[DecodeLoop], Coroutine[Any, Any, None]]) -> None:
    decoding = DecodeLoop(mixture, tiny_tokenizer())
    decoding._eos_ids = []  # these random models never end by themselves
    try:
        asyncio.run(work(decoding))
    finally:
        decoding.close()


def greedy(num_tokens: int, **changes: Any) -> Generation:
    values = {
        "prompt_ids": (1, 7),
        "max_new_tokens": num_tokens,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": None,
        "stop": (),
    }
    return Generation(**{**values, "weights": None, **changes})


def test_completions_of_different_weights_take_turns(mixture: MixtureForCausalLM) -> None:
    """Each is as if it were alone, and a short one ends before a long one that began earlier."""

    async def work(decoding: DecodeLoop) -> None:
        kinds = [{"helpful": 1.0, "harmless": 0.0}, {"helpful": 0.0, "harmless": 1.0}, None]
        generations = [greedy(n, weights=weights) for n, weights in zip((30, 20, 10), kinds, strict=True)]

        async def texts(some: list[Generation]) -> tuple[list[str], list[int]]:
            made, ended = [""] * len(some), []
            async for delta in decoding.generate(some):
                made[delta.index] += delta.text
                ended += [delta.index] if delta.finish_reason else []
            return made, ended

        together, ended = await texts(generations)
        assert ended == [2, 1, 0]
        assert together == [(await texts([one]))[0][0] for one in generations]
        assert len(set(together)) == 3

    with_loop(mixture, work)


def test_a_cancelled_completion_is_not_decoded_further(mixture: MixtureForCausalLM) -> None:
    """Leaving the iterator after 3 tokens of 3000 frees the thread within a few tokens' time."""

    async def work(decoding: DecodeLoop) -> None:
        deltas = decoding.generate([greedy(3000), greedy(3000)])
        for _ in range(3):
            await anext(deltas)
        assert decoding.num_active == 2
        await deltas.aclose()
        end = time.monotonic() + 2
        while decoding.num_active and time.monotonic() < end:
            await asyncio.sleep(0.01)
        assert decoding.num_active == 0

    with_loop(mixture, work)


def test_an_error_in_decoding_reaches_the_caller_and_the_thread_lives_on(mixture: MixtureForCausalLM) -> None:
    async def work(decoding: DecodeLoop) -> None:
        with pytest.raises(IndexError):
            async for _ in decoding.generate([greedy(3, prompt_ids=(999,))]):
                pass
        assert [delta.num_tokens async for delta in decoding.generate([greedy(2)])] == [1, 1, 0]

    with_loop(mixture, work)


def test_the_event_loop_is_free_while_tokens_are_decoded(mixture: MixtureForCausalLM) -> None:
    """Something else on the loop gets its turn between tokens."""

    async def work(decoding: DecodeLoop) -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        tokens = [delta async for delta in decoding.generate([greedy(30)])]
        ticking.cancel()
        assert ticks > len(tokens)

    with_loop(mixture, work)
