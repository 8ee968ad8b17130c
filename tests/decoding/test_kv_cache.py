"""The KV cache: prefixes are computed once, particles share their prompt, and admission never exceeds the pool."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mpo_ray.config_serving import Serve
from mpo_ray.decoding import branch
from mpo_ray.decoding.engine import MixtureEngine
from mpo_ray.decoding.need import Need, check_pool
from mpo_ray.decoding.open_engine import engine_of as engine_of_mixture
from mpo_ray.decoding.open_engine import open_engine
from mpo_ray.decoding.protocol import Delta, Mode, RequestError
from mpo_ray.decoding.runner import MixtureRunner
from mpo_ray.policies.kv_blocks import BLOCK_TOKENS, Row, blocks_for
from mpo_ray.policies.loading import ModelError
from mpo_ray.policies.memory import GIB
from mpo_ray.policies.mixture import MixtureForCausalLM
from tests.decoding.mixtures import KINDS, completed, engine_of, request, tokens
from tests.serving.served import write_mixture
from tests.world_runner import drain

LONG = [1, *(3 + (5 * place) % 20 for place in range(37))]  # two blocks and six tokens


def text(deltas: list[Delta]) -> list[int]:
    return tokens(deltas)


def runner_of(engine: MixtureEngine) -> Any:
    return engine._runner


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_turn_goes_on_from_the_first_ones_blocks(kind: str, artefacts: dict[str, Path]) -> None:
    """The same tokens as of an engine that has seen nothing, under other weights as well; never another policy's."""
    engine = engine_of(artefacts[kind])
    first = tokens(completed(engine, [request(0, LONG, max_tokens=12, ignore_eos=True)])[0])
    turn = [*LONG, *first, 4, 5, 6]
    before = engine.statistics()
    for number, weights in enumerate([None, {"positive": 0.9, "concise": 0.1, "detailed": 0.0}], start=1):
        asked = request(number, turn, temperature=1.0, seed=number, weights=weights, num_logprobs=2, max_tokens=8)
        [found] = completed(engine, [asked])
        [expected] = completed(engine_of(artefacts[kind]), [asked])
        assert tokens(found) == tokens(expected)
        for one, other in zip(found, expected, strict=True):
            assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=1e-5)
    now = engine.statistics()
    known = (len(LONG) + len(first) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert known == 48
    assert now.cached_prompt_tokens - before.cached_prompt_tokens >= 2 * known
    assert now.prompt_tokens - before.prompt_tokens <= 2 * (len(turn) - known)


def test_conversations_in_a_small_pool_get_what_they_get_in_a_fresh_one(
    artefacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns of several conversations at a time, of which some go on in place, some in a copy, some in two parts."""
    ways = Counter[str]()
    copied, singles = MixtureRunner._copy_known, branch.singles_of

    def copy_known(*args: Any) -> None:
        ways["copied"] += 1
        copied(*args)

    def singles_of(*args: Any) -> Any:
        found = singles(*args)
        ways["in parts"] += bool(found.parts)
        return found

    monkeypatch.setattr(MixtureRunner, "_copy_known", copy_known)
    monkeypatch.setattr(branch, "singles_of", singles_of)
    bytes_per_block = runner_of(engine_of(artefacts["lora"])).bytes_per_token * BLOCK_TOKENS
    engine = engine_of(artefacts["lora"], kv_cache_gib=6.5 * bytes_per_block / GIB, max_num_seqs=4)
    choose = random.Random(0)
    texts = [LONG[:n] for n in (5, 17, 20, 33)]
    for turn in range(6):
        asked = [
            request(f"{turn} {n}", text, max_tokens=choose.choice((1, 3, 20)), temperature=1.0, seed=n + 10 * turn)
            for n, text in enumerate(texts)
            if len(text) < 40 and choose.random() < 0.8
        ]
        found = completed(engine, asked)
        for one, deltas in zip(asked, found, strict=True):
            fresh = completed(engine_of(artefacts["lora"]), [one])[0]
            assert tokens(deltas) == tokens(fresh)
            number = int(one.id.split()[1])
            texts[number] = [*one.prompt_ids, *tokens(deltas), 4, 5]
        assert engine.statistics().kv_blocks_used == 0
    assert ways["copied"]
    assert ways["in parts"]
    assert engine.statistics().cached_prompt_tokens >= 16 * ways["copied"]


def test_known_blocks_are_not_taken_for_their_own_copies(artefacts: dict[str, Path]) -> None:
    """No block is blank, and the oldest ones are those that are copied, each policy's after the other's."""
    engine = engine_of(artefacts["lora"], max_num_seqs=2)
    completed(engine, [request("first", LONG[:20], max_tokens=1)])
    [model] = runner_of(engine)._branches.values()
    pool, other = model.pool, Row()
    pool.grow(other, (pool.num_blocks - 3) * BLOCK_TOKENS, pool.promise(pool.num_blocks - 3))
    for number, block in enumerate(other.blocks):
        pool.remember(0, -1, [number] * BLOCK_TOKENS, block)
    pool.close(other)
    again = request("again", [*LONG[:20], 4, 5, 6, 7], max_tokens=12, temperature=1.0, seed=1, num_logprobs=0)
    before = engine.statistics().cached_prompt_tokens
    [found] = completed(engine, [again])
    [expected] = completed(engine_of(artefacts["lora"]), [again])
    assert engine.statistics().cached_prompt_tokens == before + 16
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=1e-5)


def test_a_policy_that_was_not_asked_before_computes_its_prompt(artefacts: dict[str, Path]) -> None:
    engine = engine_of(artefacts["lora"])
    completed(engine, [request(0, LONG, weights={"positive": 1.0})])
    both = request(1, LONG, weights={"positive": 0.5, "concise": 0.5})
    assert [tokens(one) for one in completed(engine, [both])] == [
        tokens(one) for one in completed(engine_of(artefacts["lora"]), [both])
    ]
    assert engine.statistics().cached_prompt_tokens == 0


def test_log_probabilities_of_a_prompt_are_those_of_all_its_tokens(artefacts: dict[str, Path]) -> None:
    engine = engine_of(artefacts["lora"])
    asked = [request(n, LONG, prompt_logprobs=True, num_logprobs=0, max_tokens=1) for n in range(2)]
    first, second = (completed(engine, [one])[0][0].prompt_logprobs for one in asked)
    assert first is not None
    assert len(first) == len(LONG)
    assert first == second


def test_particles_share_the_blocks_of_their_prompt(artefacts: dict[str, Path]) -> None:
    """16 particles and a prompt of 32 blocks: at the first token, one prompt for each policy."""
    mixture = MixtureForCausalLM.from_pretrained(artefacts["lora"])
    mixture.config.max_position_embeddings = None
    for model in mixture.branches:
        getattr(model, "base", model).config.max_position_embeddings = 1024
    engine = engine_of_mixture(mixture, None, max_num_seqs=16, prompt_tokens=512)
    prompt = [3 + place % 20 for place in range(32 * BLOCK_TOKENS)]
    engine.submit(request(0, prompt, mode=Mode("smc", 16), temperature=1.0, seed=1, max_tokens=20))
    engine.step()
    assert engine.statistics().kv_blocks_used == 3 * 32
    engine.step()
    assert engine.statistics().kv_blocks_used <= 3 * (32 + 16)
    while engine.has_work:
        engine.step()
    assert engine.statistics().kv_blocks_used == 0


def test_admission_never_exceeds_the_pool(artefacts: dict[str, Path]) -> None:
    """A pool of 9 blocks: requests of 3 or 6 of them wait for each other, and all get what they get alone."""
    bytes_per_block = runner_of(engine_of(artefacts["lora"])).bytes_per_token * BLOCK_TOKENS
    small: dict[str, Any] = {"kv_cache_gib": 3.5 * bytes_per_block / GIB}
    engine = engine_of(artefacts["lora"], **small)
    assert engine.statistics().kv_blocks == 9
    asked = [request(n, LONG[: 5 + 2 * n], max_tokens=6, temperature=1.0, seed=n) for n in range(9)]
    for one in asked:
        engine.submit(one)
    told: dict[str, list[Delta]] = {}
    while engine.has_work:
        for name, delta in engine.step():
            assert isinstance(delta, Delta)
            told.setdefault(name, []).append(delta)
        now = engine.statistics()
        assert now.running <= 3
        assert now.kv_blocks_used <= 9
    alone = completed(engine_of(artefacts["lora"], max_num_seqs=1), asked)
    assert [tokens(told[one.id]) for one in asked] == [tokens(deltas) for deltas in alone]
    with pytest.raises(RequestError, match=r"12 KV-cache blocks \(sequences: 1, policies: 3\), and there are 9"):
        engine.submit(request(99, [*LONG, *LONG[:13]], max_tokens=13))


def test_what_failed_leaves_no_numbers_behind_that_are_none(artefacts: dict[str, Path]) -> None:
    """A request whose logits are NaN ends; the next one takes its blocks, and nothing of it is remembered."""
    engine = engine_of(artefacts["full"], max_num_seqs=1)
    asked = request(1, LONG, temperature=1.0, seed=3)
    expected = tokens(completed(engine, [asked])[0])
    engine = engine_of(artefacts["full"], max_num_seqs=1)
    embedding = next(iter(runner_of(engine)._branches.values()))._model.get_input_embeddings()
    kept = embedding.weight.detach().clone()
    with torch.no_grad():
        embedding.weight.fill_(float("nan"))
    engine.submit(request(0, LONG))
    events = []
    while engine.has_work:
        events += engine.step()
    assert "not numbers" in str(events[-1][1])
    with torch.no_grad():
        embedding.weight.copy_(kept)
    assert tokens(completed(engine, [asked])[0]) == expected


def test_a_pool_that_is_too_small_for_one_request_says_what_would_do(artefacts: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"Set kv_cache_gib to 0\.\d+ or more") as refused:
        engine_of(artefacts["lora"], kv_cache_gib=1e-6, least_tokens=40)
    enough = float(str(refused.value).split("Set kv_cache_gib to ")[1].split()[0])
    engine_of(artefacts["lora"], kv_cache_gib=enough, least_tokens=40)
    check_pool(48, 10, 48)
    with pytest.raises(ModelError, match="holds 32 tokens of this mixture, and one request can need 33"):
        check_pool(32, 10**6, 33)


def test_a_model_with_a_context_of_262144_is_opened_with_the_defaults(tmp_path: Path) -> None:
    """Its 64 sequences of a whole context would be 8 GiB; the pool is a share of what is free, the context is whole."""
    artefact = write_mixture(tmp_path, context=262_144)
    serve = Serve()
    before = psutil.Process().memory_info().rss
    engine = open_engine(str(artefact), max_num_seqs=serve.max_num_seqs, least_tokens=serve.least_tokens)
    assert runner_of(engine).context == 262_144
    assert runner_of(engine).num_tokens <= 64 * 262_144
    assert "of KV cache: " in str(engine)
    assert len(tokens(completed(engine, [request(0, LONG, max_tokens=20, ignore_eos=True)])[0])) == 20
    assert psutil.Process().memory_info().rss - before < GIB, "memory was taken for tokens that nobody asked for"


OUT_OF_MEMORY = """
import resource, sys
import psutil, torch
from mpo_ray.decoding.open_engine import open_engine
from mpo_ray.decoding.protocol import GenerationRequest, Sampling
torch.set_num_threads(1)
engine = open_engine(sys.argv[1], max_num_seqs=2, prompt_tokens=4096)
def told(number, prompt, sampling):
    engine.submit(GenerationRequest(str(number), prompt, sampling))
    events = []
    while engine.has_work:
        events += engine.step()
    return events[-1][1]
small = Sampling(2, temperature=0.0)
expected = told(0, (1, 8, 9), small)
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**27, -1))
print(told(1, (1, 8, 9) * 1300, Sampling(1, prompt_logprobs=True, num_logprobs=0)))
print(told(2, (1, 8, 9), small).tokens == expected.tokens)
"""


def test_a_pass_without_memory_ends_its_request_in_words_and_the_next_is_answered(tmp_path: Path) -> None:
    """A limit of the process stands for a machine that has no more: the attention mask alone is 61 MB, twice."""
    artefact = write_mixture(tmp_path, context=8192)
    code = [sys.executable, "-c", OUT_OF_MEMORY, str(artefact)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    words, answered = done.stdout.splitlines()[-2:]
    assert re.fullmatch(r"decoding: out of memory: .* could not be had\. Lower kv_cache_gib, .*", words)
    assert answered == "True"


def test_a_cache_for_one_policy_holds_nothing_for_the_others(artefacts: dict[str, Path]) -> None:
    """Two models of their own: what one alone is drawn from has the whole cache."""
    runner = runner_of(engine_of(artefacts["full"]))
    everyone = runner.bytes_per_token
    runner.reserve(max_num_seqs=2, context=64, policies=[1])
    own, *others = sorted((each.pool.num_blocks for each in runner._branches.values()), reverse=True)
    assert (own, {*others}) == (2 * blocks_for(64), {1})
    assert runner.bytes_per_token == everyone // (1 + len(others))
    assert runner.fits(Need((1,), (1, 2), 62))


def test_a_prompt_that_is_being_computed_holds_up_its_like_and_nobody_else(artefacts: dict[str, Path]) -> None:
    engine = engine_of(artefacts["lora"], prompt_tokens=BLOCK_TOKENS)
    for number, prompt in enumerate((LONG, LONG, (1, 8, 9))):
        engine.submit(request(number, prompt, max_tokens=4))
    engine.step()
    assert [*engine._running] == ["0", "2"]
    assert [run.request.id for run in engine._waiting] == ["1"]
    told = drain(engine)
    assert [*told["0"]][-1].finish_reason is not None
    assert tokens(told["0"]) == tokens(told["1"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_precision_is_that_of_weights_and_kv_cache(kind: str, artefacts: dict[str, Path]) -> None:
    """The artefact's own is fp32; the likeliest tokens are the same in half of the memory."""
    found = {}
    for precision in ("auto", "fp32", "bf16", "fp16"):
        engine = engine_of(artefacts[kind], precision=precision)
        found[precision] = (runner_of(engine).bytes_per_token, tokens(completed(engine, [request(0, LONG)])[0])[:2])
    whole, half = found["fp32"][0], found["bf16"][0]
    assert (found["auto"], half, found["fp16"][0]) == (found["fp32"], whole // 2, whole // 2)
    assert found["fp16"][1] == found["fp32"][1]
