"""The engine decodes what the mixture is, whoever else is decoded beside: tokens, log-probabilities, log Z_t."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpo_ray.decoding.protocol import Delta, Mode
from mpo_ray.maths.log_linear import log_normalizer
from mpo_ray.policies.mixture import MixtureForCausalLM
from tests.decoding.mixtures import EOS, KINDS, PROMPTS, completed, engine_of, request, tokens
from tests.policies.material import WEIGHTS

CLOSE = {"abs": 1e-5, "rel": 1e-5}


def mixed_logits(model: MixtureForCausalLM, ids: list[int], weights: dict[str, float] | None = None) -> torch.Tensor:
    """Σ_k λ_k log π_k after each token, (T, V), by one plain forward pass."""
    rows = None if weights is None else torch.tensor([[weights.get(name, 0.0) for name in WEIGHTS]])
    with torch.no_grad():
        return model(torch.tensor([ids]), mixture_weights=rows).logits[0]


def greedy(model: MixtureForCausalLM, prompt: tuple[int, ...], num: int) -> list[int]:
    ids = torch.tensor([prompt])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num)
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt_tokens", [128, 3])
def test_the_engine_gives_the_tokens_of_generate(
    kind: str, prompt_tokens: int, artefacts: dict[str, Path], plain: dict[str, MixtureForCausalLM]
) -> None:
    """Greedy, four prompts side by side; prompts computed at once, or in pieces of three tokens."""
    engine = engine_of(artefacts[kind], prompt_tokens=prompt_tokens)
    told = completed(engine, [request(n, prompt) for n, prompt in enumerate(PROMPTS)])
    for prompt, deltas in zip(PROMPTS, told, strict=True):
        assert tokens(deltas) == greedy(plain[kind], prompt, 12)
        assert deltas[-1].finish_reason == ("stop" if tokens(deltas)[-1] == EOS else "length")
    assert engine.statistics().kv_blocks_used == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt_tokens", [128, 3])
def test_log_probabilities_are_those_of_a_plain_forward_pass(
    kind: str, prompt_tokens: int, artefacts: dict[str, Path], plain: dict[str, MixtureForCausalLM]
) -> None:
    """log q_t, log Z_t and log π_k of drawn tokens, log q_t of the prompt's, to 1e-5; the top are the likeliest."""
    fields = {"num_logprobs": 3, "policy_logprobs": True, "prompt_logprobs": True, "temperature": 1.0, "seed": 5}
    engine = engine_of(artefacts[kind], prompt_tokens=prompt_tokens)
    for prompt, deltas in zip(
        PROMPTS, completed(engine, [request(n, p, **fields) for n, p in enumerate(PROMPTS)]), strict=True
    ):
        ids = [*prompt, *tokens(deltas)]
        mixed = mixed_logits(plain[kind], ids).double()
        log_z = log_normalizer(mixed)
        logprobs = mixed - log_z[:, None]
        told = [one for delta in deltas for one in delta.logprobs]
        assert deltas[0].prompt_logprobs is not None
        for place, one in enumerate([*deltas[0].prompt_logprobs[1:], *told]):
            assert one is not None
            assert one.token == ids[place + 1]
            assert one.logprob == pytest.approx(float(logprobs[place, one.token]), **CLOSE)
            values, likeliest = logprobs[place].topk(3)
            assert [token for token, _ in one.top] == likeliest.tolist()
            assert [value for _, value in one.top] == pytest.approx(values.tolist(), **CLOSE)
        for place, one in enumerate(told, start=len(prompt) - 1):
            assert one.log_z == pytest.approx(float(log_z[place]), **CLOSE)
            for name, value in (one.by_policy or {}).items():
                alone = mixed_logits(plain[kind], ids, {name: 1.0})[place].log_softmax(-1)
                assert value == pytest.approx(float(alone[one.token]), **CLOSE)
            assert {*(one.by_policy or {})} == {*WEIGHTS}
        assert deltas[-1].diagnostics is not None
        assert deltas[-1].diagnostics.log_z == pytest.approx(sum(one.log_z or 0.0 for one in told), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_through_the_output_head_is_as_exact_as_one_for_each_policy(
    kind: str, artefacts: dict[str, Path], plain: dict[str, MixtureForCausalLM]
) -> None:
    """Σ_k λ_k W h_k = W Σ_k λ_k h_k: without log Z_t the distributions are the same, and log Z_t is not told."""
    engine = engine_of(artefacts[kind])
    asked = [request(n, p, num_logprobs=0, mode=Mode(log_z=bool(n % 2))) for n, p in enumerate(PROMPTS)]
    for prompt, one, deltas in zip(PROMPTS, asked, completed(engine, asked), strict=True):
        assert tokens(deltas) == greedy(plain[kind], prompt, 12)
        logprobs = mixed_logits(plain[kind], [*prompt, *tokens(deltas)]).log_softmax(-1)
        for place, told in enumerate((one for d in deltas for one in d.logprobs), start=len(prompt) - 1):
            assert told.logprob == pytest.approx(float(logprobs[place, told.token]), **CLOSE)
            assert (told.log_z is None) == (not one.mode.log_z)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_each_request_and_a_policy_without_weight_has_no_row(
    kind: str, artefacts: dict[str, Path], plain: dict[str, MixtureForCausalLM]
) -> None:
    """One batch, four λ: each request gets its own mixture, and takes a row for every policy with a weight."""
    weights = [{"positive": 1.0}, {"concise": 0.5, "detailed": 0.5}, WEIGHTS, {"detailed": 1.0}]
    engine = engine_of(artefacts[kind])
    asked = [request(n, p, num_logprobs=0, weights=w) for n, (p, w) in enumerate(zip(PROMPTS, weights, strict=True))]
    for one in asked:
        engine.submit(one)
    first = engine.step()
    assert engine.statistics().kv_blocks_used == 1 + 2 + 3 + 1
    told: dict[str, list[Delta]] = {name: [delta] for name, delta in first if isinstance(delta, Delta)}
    while engine.has_work:
        for name, delta in engine.step():
            assert isinstance(delta, Delta)
            told[name].append(delta)
    for one, prompt, given in zip(asked, PROMPTS, weights, strict=True):
        ids = [*prompt, *tokens(told[one.id])]
        logprobs = mixed_logits(plain[kind], ids, given).log_softmax(-1)
        for place, entry in enumerate((e for d in told[one.id] for e in d.logprobs), start=len(prompt) - 1):
            assert entry.logprob == pytest.approx(float(logprobs[place, entry.token]), **CLOSE)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(kind: str, artefacts: dict[str, Path]) -> None:
    """Beside greedy, sampled and exact requests that come and go while it is decoded, in any mode."""
    modes = (Mode(), Mode("smc", 3), Mode("rejection", 2, 10_000))
    mine = [request(n, PROMPTS[0], temperature=1.0, seed=7, mode=mode) for n, mode in enumerate(modes)]
    engine = engine_of(artefacts[kind], max_num_seqs=20)
    alone = [completed(engine, [one])[0] for one in mine]
    others = [request(10 + n, PROMPTS[n % 4], temperature=1.0, seed=n, max_tokens=3 + 5 * (n % 3)) for n in range(12)]
    crowd = completed(engine, [*others[:5], *mine, *others[5:], request(99, PROMPTS[2], mode=Mode())])[5:8]
    for single, beside in zip(alone, crowd, strict=True):
        assert tokens(single) == tokens(beside)
        assert "".join(d.text for d in single) == "".join(d.text for d in beside)


def test_joining_and_leaving_in_the_middle_changes_nothing(
    artefacts: dict[str, Path], plain: dict[str, MixtureForCausalLM]
) -> None:
    """A request joins at every third step and the second of them is aborted: all others get what they get alone."""
    engine = engine_of(artefacts["lora"], max_num_seqs=3)  # rows are taken again, with what others left in them
    told: dict[str, list[Delta]] = {}
    prompts = [PROMPTS[n % 4] for n in range(9)]
    waiting = [request(n, prompt) for n, prompt in enumerate(prompts)]
    steps = 0
    while engine.has_work or waiting:
        if waiting and steps % 3 == 0:
            engine.submit(waiting.pop(0))
        if steps == 5:
            assert engine.abort("1")
        for name, delta in engine.step():
            assert isinstance(delta, Delta)
            told.setdefault(name, []).append(delta)
        steps += 1
    for n, prompt in enumerate(prompts):
        expected = greedy(plain["lora"], prompt, 12)
        assert tokens(told[str(n)]) == (expected[: len(tokens(told["1"]))] if n == 1 else expected)
    assert tokens(told["1"]) != greedy(plain["lora"], prompts[1], 12)


def test_prompts_are_computed_in_bounded_pieces_beside_the_running_completions(artefacts: dict[str, Path]) -> None:
    """A prompt of ten tokens joins in pieces of three: the running completion gets a token at every step."""
    engine = engine_of(artefacts["lora"], prompt_tokens=3)
    engine.submit(request(0, PROMPTS[3], ignore_eos=True, max_tokens=30))
    engine.step()
    engine.submit(request(1, PROMPTS[2]))
    steps = [[name for name, _ in engine.step()] for _ in range(4)]
    assert steps == [["0"], ["0"], ["0"], ["0", "1"]]


def test_a_request_for_no_token_is_answered_with_its_prompt(artefacts: dict[str, Path]) -> None:
    engine = engine_of(artefacts["lora"])
    [[delta]] = completed(engine, [request(0, PROMPTS[2], max_tokens=0, prompt_logprobs=True)])
    assert delta.tokens == ()
    assert delta.prompt_logprobs is not None
    assert len(delta.prompt_logprobs) == len(PROMPTS[2])
    assert delta.finish_reason == "length"


def test_stop_strings_ids_and_limits_end_a_completion(artefacts: dict[str, Path]) -> None:
    """The text ends before the stop string; min_tokens comes first; ignore_eos goes on to the limit."""
    engine = engine_of(artefacts["lora"])
    whole = completed(engine, [request(0, PROMPTS[0], ignore_eos=True, max_tokens=20)])[0]
    words = "".join(delta.text for delta in whole).split()
    assert len(tokens(whole)) == 20
    stop = f" {words[3]}"
    [found] = completed(engine, [request(1, PROMPTS[0], ignore_eos=True, max_tokens=20, stop=(stop,))])
    text = "".join(delta.text for delta in whole)
    assert "".join(delta.text for delta in found) == text[: text.index(stop)]
    assert (found[-1].finish_reason, found[-1].stop) == ("stop", stop)
    third = tokens(whole)[2]
    [ended] = completed(engine, [request(2, PROMPTS[0], ignore_eos=True, max_tokens=20, stop_ids=(third,))])
    assert tokens(ended) == tokens(whole)[: tokens(whole).index(third) + 1]
    assert ended[-1].stop == third
    [longer] = completed(engine, [request(3, PROMPTS[0], stop_ids=(third,), min_tokens=6)])
    assert len(tokens(longer)) > 6
    assert third not in tokens(longer)[:6]


def test_a_request_whose_logits_are_not_numbers_fails_alone(
    artefacts: dict[str, Path], plain: dict[str, MixtureForCausalLM]
) -> None:
    """A weight so large that λ log π overflows: that request ends with an error, its neighbour does not notice."""
    engine = engine_of(artefacts["lora"])
    poison = replace(request(0, PROMPTS[0]), weights={"positive": 3e38, "concise": -3e38})
    engine.submit(poison)
    engine.submit(request(1, PROMPTS[0]))
    told: dict[str, list[Delta | Exception]] = {}
    while engine.has_work:
        for name, item in engine.step():
            told.setdefault(name, []).append(item)
    assert "not numbers" in str(told["0"][-1])
    good = [item for item in told["1"] if isinstance(item, Delta)]
    assert tokens(good) == greedy(plain["lora"], PROMPTS[0], 12)
    assert engine.statistics().failed == 1
    assert engine.statistics().kv_blocks_used == 0
