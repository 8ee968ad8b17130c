"""Log-probabilities in answers are the mixture's own, to 1e-4; a prompt that is echoed is scored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mpo_ray.policies.mixture import MixtureForCausalLM
from tests.serving.live import NAME, PROMPT, WEIGHTS, Live

CLOSE = 1e-4


@pytest.fixture(scope="module")
def mixture(live: Live) -> MixtureForCausalLM:
    return MixtureForCausalLM.from_pretrained(live.artefact)


def next_logprobs(mixture: Any, ids: list[int]) -> torch.Tensor:
    """log q(v | the first t of `ids`) for every t ≥ 1: (T, V), by one forward pass of the mixture itself."""
    with torch.no_grad():
        return mixture(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_every_token_has_the_mixture_s_own_log_probability(live: Live, mixture: MixtureForCausalLM) -> None:
    """Before temperature and penalties; the drawn token's value is its entry among the likeliest, to the last bit."""
    prompt = live.tokenizer(PROMPT)["input_ids"]
    body = {"model": NAME, "messages": [{"role": "user", "content": "good"}], "logprobs": True, "top_logprobs": 20}
    settings = {"max_tokens": 12, "seed": 4, "temperature": 1.3, "frequency_penalty": 1.0, "ignore_eos": True}
    content = live.post("/v1/chat/completions", body | settings).json()["choices"][0]["logprobs"]["content"]
    ids = live.post("/tokenize", {"messages": body["messages"]}).json()["tokens"]
    names = {name: id for id, name in enumerate(live.tokenizer.convert_ids_to_tokens(range(25)))}
    drawn = [names[token["token"].strip()] for token in content]
    truth = next_logprobs(mixture, ids + drawn)
    assert len(content) == 12
    for place, token in enumerate(content):
        row = truth[len(ids) - 1 + place]
        assert token["logprob"] == pytest.approx(float(row[drawn[place]]), abs=CLOSE)
        values = [one["logprob"] for one in token["top_logprobs"]]
        assert values == pytest.approx(row.sort(descending=True).values[:20].tolist(), abs=CLOSE)
        named = {one["token"]: one["logprob"] for one in token["top_logprobs"]}
        assert named.get(token["token"], token["logprob"]) == token["logprob"]
        assert bytes(token["bytes"]).decode() == token["token"]
    assert live.complete(prompt=prompt, max_tokens=0, echo=True)["choices"][0]["text"] == PROMPT


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_an_echoed_prompt_is_scored_token_by_token(live: Live, mixture: MixtureForCausalLM, max_tokens: int) -> None:
    """Null for the first token, then log q of each; the completion's own tokens follow. As lm_eval reads it."""
    prompt = "the film was good and not very long"
    ids = live.tokenizer(prompt)["input_ids"]
    answer = live.complete(prompt=ids, max_tokens=max_tokens, echo=True, logprobs=1, seed=2, ignore_eos=True)
    [choice] = answer["choices"]
    logprobs = choice["logprobs"]
    names = {name: id for id, name in enumerate(live.tokenizer.convert_ids_to_tokens(range(25)))}
    tokens = [names[token.strip()] for token in logprobs["tokens"]]
    assert tokens[: len(ids)] == ids
    assert len(tokens) == len(ids) + max_tokens
    truth = next_logprobs(mixture, tokens)
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    for place in range(1, len(tokens)):
        row, value = truth[place - 1], logprobs["token_logprobs"][place]
        assert value == pytest.approx(float(row[tokens[place]]), abs=CLOSE)
        top = logprobs["top_logprobs"][place]
        assert max(top.values()) == pytest.approx(float(row.max()), abs=CLOSE)
        assert top[logprobs["tokens"][place]] == value
        assert (value == max(top.values())) == (int(row.argmax()) == tokens[place])
    assert choice["text"].startswith(prompt)
    assert choice["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": len(ids), "completion_tokens": max_tokens, "total_tokens": len(ids) + max_tokens,
    }  # fmt: skip


@pytest.mark.parametrize("echo", [False, True])
def test_text_offsets_are_where_the_tokens_are(live: Live, live_bytes: Live, echo: bool) -> None:
    for here in (live, live_bytes):
        [choice] = here.complete(max_tokens=8, logprobs=0, echo=echo, seed=6, ignore_eos=True)["choices"]
        pairs = list(zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True))
        plain = [(token, place) for token, place in pairs if not token.startswith(("bytes:", "<"))]
        assert plain
        for token, place in plain:
            assert choice["text"].startswith(token, place), (choice["text"], token, place)


def test_each_policy_and_log_z_explain_the_mixture(live: Live, engine_name: str) -> None:
    """log q(v) = Σ_k λ_k log π_k(v) − log Z_t, and the choice's log_z is Σ_t log Z_t   (design 2.3, eq. 7)"""
    if engine_name == "vllm":
        pytest.skip("vLLM does not tell the policies' own log-probabilities; tests/vllm_plugin has the refusal")
    [choice] = live.complete(max_tokens=9, seed=1, logprobs=0, mixture={"policy_logprobs": True})["choices"]
    logprobs = choice["logprobs"]
    for value, policies, log_z in zip(
        logprobs["token_logprobs"], logprobs["policy_logprobs"], logprobs["log_z"], strict=True
    ):
        assert value == pytest.approx(sum(WEIGHTS[name] * policies[name] for name in WEIGHTS) - log_z, abs=CLOSE)
        assert log_z <= 0
    assert choice["mixture"]["log_z"] == pytest.approx(math.fsum(logprobs["log_z"]), abs=CLOSE)
    [silent] = live.complete(max_tokens=9, seed=1, mixture={"log_z": False})["choices"]
    assert silent["mixture"]["log_z"] is None
    assert silent["text"] == choice["text"]


def test_a_model_id_of_one_policy_is_that_policy(live: Live) -> None:
    """λ one-hot: Z_t = 1, and the log-probabilities are those of transformers' own loop over the policy."""
    policy = AutoModelForCausalLM.from_pretrained(live.artefact, weights={"helpful": 1.0, "harmless": 0.0})
    ids = live.tokenizer(PROMPT)["input_ids"]
    [choice] = live.complete(model=f"{NAME}/helpful", echo=True, logprobs=0, max_tokens=0, prompt=ids)["choices"]
    rows = next_logprobs(policy, ids)[:-1]
    expected = rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=CLOSE)
    assert choice["mixture"]["weights"] == {"helpful": 1.0, "harmless": 0.0}


def test_repetition_is_penalised_on_the_mixture_s_normalised_log_probabilities(
    live: Live, mixture: MixtureForCausalLM
) -> None:
    """log q is below 0 everywhere, so a token seen before has log q · penalty, whatever the sign of its logit."""
    prompt = live.tokenizer("the film was good good very very")["input_ids"]
    row = next_logprobs(mixture, prompt)[-1]
    for penalty in (0.2, 3.0):
        expected = row.clone()
        seen = sorted({*prompt})
        expected[seen] *= penalty
        [choice] = live.complete(
            prompt=prompt, max_tokens=1, temperature=0.0, repetition_penalty=penalty, logprobs=0, min_tokens=0
        )["choices"]
        [text] = choice["logprobs"]["tokens"]
        assert text.strip() == live.tokenizer.convert_ids_to_tokens(int(expected.argmax()))
        assert choice["logprobs"]["token_logprobs"][0] == pytest.approx(float(row[int(expected.argmax())]), abs=CLOSE)
