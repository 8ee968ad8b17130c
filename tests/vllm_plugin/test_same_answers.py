"""vLLM behind the engine protocol says what our own engine says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mpo_ray.decoding.open_engine import open_engine
from mpo_ray.decoding.protocol import Delta
from tests.decoding.mixtures import completed, tokens
from tests.vllm_plugin.mixtures import MARKS, requests, write_mixture
from tests.vllm_plugin.test_engine import leave, request, told

pytestmark = MARKS


@pytest.mark.parametrize("kinds", ["aaa", "fff"], ids=["adapters", "full weights"])
def test_greedy_answers_are_our_own_engines_while_others_come_and_go(kinds: str, tmp_path: Path) -> None:
    """200 requests that come one after the other, every third with a neighbour that leaves after its second token.

    Tokens, text, ends, log-probabilities, log Z_t and the prompt's log-probabilities, to 1e-3.
    """
    from mpo_ray.vllm_plugin.engine import VllmEngine

    asked = [
        request(
            number, prompt=prompt, weights=weights, max_tokens=length, num_logprobs=2, prompt_logprobs=number % 5 == 0,
            stop=("good", "not at") if number % 4 == 0 else (), min_tokens=min(number % 3, length),
        )
        for number, (prompt, _, weights, length) in enumerate(requests(200))
    ]  # fmt: skip

    async def ask_all() -> list[list[Delta]]:
        tasks, leaving = [], []
        for number, wanted in enumerate(asked):
            tasks.append(asyncio.create_task(told(engine, wanted)))
            if number % 3 == 0:
                leaving.append(asyncio.create_task(leave(engine, request(1000 + number, max_tokens=100), after=2)))
            await asyncio.sleep(0.01)
        await asyncio.gather(*leaving)
        return await asyncio.gather(*tasks)

    artefact = str(write_mixture(tmp_path, "llama", kinds))
    engine = VllmEngine(artefact, max_num_seqs=16)
    try:
        found = asyncio.run(ask_all())
    finally:
        engine.close()
    expected = completed(open_engine(artefact, max_num_seqs=16, max_waiting=1000), asked)
    for mine, theirs in zip(found, expected, strict=True):
        assert tokens(mine) == tokens(theirs)
        assert "".join(delta.text for delta in mine) == "".join(delta.text for delta in theirs)
        assert (mine[-1].finish_reason, mine[-1].stop) == (theirs[-1].finish_reason, theirs[-1].stop)
        for ours, other in zip(entries(mine), entries(theirs), strict=True):
            assert ours.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert [value for _, value in ours.top] == pytest.approx([value for _, value in other.top], abs=1e-3)
            assert ours.log_z == pytest.approx(other.log_z, abs=1e-3)
        ours, other = mine[-1].diagnostics, theirs[-1].diagnostics
        assert ours is not None
        assert other is not None
        assert ours.log_z == pytest.approx(other.log_z, abs=1e-3 * max(1, len(tokens(mine))))
        assert ours.weights == other.weights


def entries(deltas: Sequence[Delta]) -> list[Any]:
    """Every log-probability that was told, the prompt's first."""
    prompt = [entry for delta in deltas for entry in delta.prompt_logprobs or () if entry is not None]
    return prompt + [entry for delta in deltas for entry in delta.logprobs]
