"""vLLM behind the engine protocol: it answers as our own engine does, draws as it should, and holds nothing after."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpo_ray.config import ConfigError
from mpo_ray.decoding.protocol import (
    Delta,
    EngineError,
    GenerationRequest,
    Mode,
    NothingAcceptedError,
    QueueFullError,
    RequestError,
    Sampling,
)
from mpo_ray.maths.log_linear import log_normalizer
from mpo_ray.policies.mixture import MixtureForCausalLM
from tests.decoding.mixtures import Response, p_value, tokens
from tests.vllm_plugin.mixtures import MARKS, NAMES, WEIGHTS, write_mixture

pytestmark = MARKS
PROMPT, LIMIT, PASSES = (1, 7, 8), 2, 1e-4
#: Half of the tokens end a response, so that some are shorter than others.
ENDS = (2, *range(4, 15))
LANES = 64


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of different ranks and a policy with full weights."""
    return write_mixture(tmp_path_factory.mktemp("engine"), "llama", "afa")


@pytest.fixture(scope="module")
def engine(artefact: Path) -> Iterator[Any]:
    from mpo_ray.vllm_plugin.engine import VllmEngine

    engine = VllmEngine(str(artefact), max_num_seqs=LANES, max_waiting=10_000, cache_salt="one")
    yield engine
    engine.close()


async def told(engine: Any, request: GenerationRequest) -> list[Delta]:
    async with aclosing(engine.generate(request)) as deltas:
        return [delta async for delta in deltas]


def answers(engine: Any, asked: Sequence[GenerationRequest]) -> list[list[Delta]]:
    """What is said of each when all are asked at once."""

    async def ask() -> list[list[Delta]]:
        return await asyncio.gather(*(told(engine, request) for request in asked))

    return asyncio.run(ask())


def one(engine: Any, **fields: Any) -> list[Delta]:
    """The answer to a single request."""
    return answers(engine, [request(0, **fields)])[0]


def request(number: int, *, prompt: Sequence[int] = PROMPT, mode: Mode | None = None, **fields: Any) -> Any:
    weights = fields.pop("weights", None)
    sampling = Sampling(**{"max_tokens": 8, "temperature": 0.0, **fields})
    return GenerationRequest(str(number), tuple(prompt), sampling, mode or Mode(), weights)


async def leave(engine: Any, request: GenerationRequest, *, after: int) -> None:
    """Take so many tokens, and go."""
    async with aclosing(engine.generate(request)) as deltas:
        for _ in range(after):
            await anext(deltas)


@pytest.fixture(scope="module")
def exact(artefact: Path) -> dict[str, dict[Response, float]]:
    """log q(y) and log π_λ(y) of every response to PROMPT, by plain forward passes (eq. 7)."""
    model = MixtureForCausalLM.from_pretrained(artefact)

    def after(prefix: Response) -> tuple[torch.Tensor, float]:
        with torch.no_grad():
            mixed = model(torch.tensor([[*PROMPT, *prefix]])).logits[0, -1].double()
        log_z = float(log_normalizer(mixed))
        return mixed - log_z, log_z

    log_q: dict[Response, float] = {}
    log_pi: dict[Response, float] = {}
    first, first_z = after(())
    for token, logprob in enumerate(first.tolist()):
        if token in ENDS:
            log_q[token,], log_pi[token,] = logprob, logprob + first_z
            continue
        second, second_z = after((token,))
        for other, further in enumerate(second.tolist()):
            log_q[token, other] = logprob + further
            log_pi[token, other] = logprob + further + first_z + second_z
    total = np.logaddexp.reduce(list(log_pi.values()))
    return {"token": log_q, "sequence": {y: value - total for y, value in log_pi.items()}}


@pytest.mark.parametrize(
    ("mode", "level", "other"),
    [(Mode(), "token", "sequence"), (Mode("rejection", 4, 10_000), "sequence", "token")],
    ids=["token", "rejection"],
)
def test_draws_are_of_their_distribution_and_of_no_other(
    engine: Any, exact: dict[str, dict[Response, float]], mode: Mode, level: str, other: str
) -> None:
    fields: dict[str, Any] = {"max_tokens": LIMIT, "temperature": 1.0, "stop_ids": ENDS[1:]}
    asked = [request(seed, mode=mode, seed=seed, **fields) for seed in range(1500)]
    found = [tuple(tokens(deltas)) for deltas in answers(engine, asked)]
    assert p_value(found, exact[level]) > PASSES
    assert p_value(found, exact[other]) < PASSES


def test_the_temperature_of_rejection_is_that_of_whole_sequences(engine: Any, artefact: Path) -> None:
    """λ/τ is decoded, told, and what log Z_t is of: as our engine's, of the tokens that came out."""
    mode = Mode("rejection", 2, 10_000)
    weights = {"helpful": 0.9, "harmless": 0.1}
    [last] = one(engine, mode=mode, weights=weights, max_tokens=3, temperature=0.8, seed=3, num_logprobs=1)
    told = last.diagnostics
    assert told is not None
    assert len(last.tokens) > 1, "another seed, for an answer that shows something"
    assert told.weights == pytest.approx({"helpful": 0.9 / 0.8, "harmless": 0.1 / 0.8, "2": 0.0})
    model = MixtureForCausalLM.from_pretrained(artefact)
    with torch.no_grad():
        ids = torch.tensor([[*PROMPT, *last.tokens]])
        mixed = model(ids, mixture_weights=torch.tensor([list(told.weights.values())]).double()).logits[0]
    factors = log_normalizer(mixed[len(PROMPT) - 1 : -1].double())
    assert told.log_z == pytest.approx(float(factors.sum()), abs=1e-3)
    assert [entry.log_z for entry in last.logprobs] == pytest.approx(factors.tolist(), abs=1e-3)
    assert told.attempts is not None
    assert told.log_z_hat == pytest.approx(-np.log(told.attempts))


def test_a_seed_draws_the_same_alone_and_in_a_crowd(engine: Any) -> None:
    asked = [request(seed, temperature=1.0, seed=seed, max_tokens=12) for seed in range(40)]
    crowd = [tokens(deltas) for deltas in answers(engine, asked)]
    assert [tokens(answers(engine, [single])[0]) for single in asked[:5]] == crowd[:5]
    assert len({tuple(one) for one in crowd}) > 30


def test_default_weights_are_changed_for_requests_to_come(engine: Any, artefact: Path) -> None:
    harmless = {"harmless": 1.0}
    engine.set_weights(harmless)
    try:
        last = one(engine)[-1].diagnostics
        assert last is not None
        assert last.weights == {"helpful": 0.0, "harmless": 1.0, "2": 0.0}
        assert tokens(one(engine)) == tokens(one(engine, weights=harmless))
    finally:
        engine.set_weights(WEIGHTS)
    with pytest.raises(ValueError, match=r"sum to 0\.5, not 1"):
        engine.set_weights({"harmless": 0.5})


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"mode": Mode("smc", 4), "temperature": 1.0},
            "method",
            'ask for method "rejection", or serve with engine: mpo',
        ),
        ({"policy_logprobs": True}, "policy_logprobs", "the policies' own log-probabilities are not known; leave"),
        ({"weights": {"kind": 1.0}}, "weights", "there is no objective 'kind'; there are helpful, harmless, 2"),
        ({"prompt": [1, 99]}, "prompt", "the token id 99 is not in the vocabulary of 25"),
        ({"max_tokens": 400}, "prompt", "the context is 320 tokens"),
        ({"min_tokens": 1, "stop_ids": tuple(range(25))}, "stop_ids", "every token ends the completion"),
        ({"presence_penalty": 3.0}, "sampling", "presence_penalty must be in"),
        ({"num_logprobs": 21}, "logprobs", "Requested sample logprobs of 23, which is greater than max allowed: 22"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_and_the_next_is_answered(
    engine: Any, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        one(engine, **fields)
    assert refused.value.param == param
    assert len(tokens(one(engine, ignore_eos=True))) == 8


def test_an_argument_that_vllm_does_not_have_is_refused_by_name(artefact: Path) -> None:
    from mpo_ray.vllm_plugin.engine import VllmEngine

    with pytest.raises(ConfigError, match=r"serve\.vllm\.kind: vLLM has no such engine argument"):
        VllmEngine(str(artefact), max_num_seqs=1, arguments={"kind": 1})


def test_a_model_without_a_limit_of_its_own_needs_one(artefact: Path, tmp_path: Path) -> None:
    from mpo_ray.vllm_plugin.engine import VllmEngine

    shutil.copytree(artefact, tmp_path / "mixture")
    path = tmp_path / "mixture" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": None}))
    with pytest.raises(ConfigError, match=r"serve\.context: the model names no limit of its own; set how long"):
        VllmEngine(str(tmp_path / "mixture"), max_num_seqs=1)


def test_rejection_gives_up_after_its_attempts(engine: Any) -> None:
    with pytest.raises(NothingAcceptedError, match="3 attempts were made and none was accepted"):
        one(engine, mode=Mode("rejection", 2, 3), temperature=1.0, max_tokens=60, seed=0)


def test_who_leaves_and_who_is_aborted_hold_nothing(engine: Any) -> None:
    """100 requests that leave or are aborted at any time, some before they began; then all is as before."""
    before = engine.statistics()

    async def go() -> None:
        asked = [request(number, max_tokens=200, ignore_eos=True) for number in range(50)]
        leaving = [leave(engine, wanted, after=1 + number % 4) for number, wanted in enumerate(asked)]
        ended = [asyncio.create_task(told(engine, request(number, max_tokens=200))) for number in range(50, 100)]
        tasks = [asyncio.create_task(one) for one in leaving]
        await asyncio.sleep(0.05)
        for number in range(50, 100):
            await engine.abort(str(number))
        await engine.abort("unknown")
        await asyncio.gather(*tasks, *ended)
        while engine.statistics().running:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(go(), 60))
    after = engine.statistics()
    assert (after.running, after.waiting, after.kv_blocks_used) == (0, 0, 0)
    ended = after.aborted + after.finished - before.aborted - before.finished
    assert ended == 100
    assert after.aborted - before.aborted > 50
    assert len(tokens(one(engine, ignore_eos=True))) == 8


def test_more_than_may_wait_are_refused(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_max_waiting", 0)

    async def go() -> None:
        running = [asyncio.create_task(told(engine, request(number, max_tokens=50))) for number in range(LANES)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="0 requests are waiting already"):
            await told(engine, request(LANES))
        await asyncio.gather(*running)

    asyncio.run(go())


def test_weights_share_a_prefix_and_artefacts_do_not(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """λ decides nothing about keys and values; the salt, which is the artefact's digest, keeps artefacts apart."""
    prompt = [1, *(5 + number * 7 % 19 for number in range(280))]

    def computed(**fields: Any) -> int:
        before = engine.statistics().prompt_tokens
        one(engine, prompt=prompt, max_tokens=2, **fields)
        return int(engine.statistics().prompt_tokens - before)

    assert computed() == 281
    assert computed(weights={"helpful": 1.0}) == 281 - 2 * 128
    assert computed(weights={"helpful": 0.2, "2": 0.8}) == 281 - 2 * 128
    monkeypatch.setattr(engine, "_source", replace(engine._source, cache_salt="another artefact"))
    assert computed() == 281


def test_it_is_healthy_until_it_says_nothing_for_too_long(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.check_health()
    assert engine.objectives == NAMES
    monkeypatch.setattr(engine, "_stuck_after", -1.0)
    monkeypatch.setattr(engine, "_failure", None)

    async def go() -> None:
        waiting = asyncio.create_task(told(engine, request(0, max_tokens=300, ignore_eos=True)))
        while not engine.statistics().running:
            await asyncio.sleep(0.001)
        with pytest.raises(EngineError, match="vLLM has said nothing for 0 s"):
            engine.check_health()
        with pytest.raises(EngineError, match="vLLM has said nothing for 0 s"):
            await waiting

    asyncio.run(go())
