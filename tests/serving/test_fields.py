"""Every field reaches the decoder, or is refused by name. No Ray, no HTTP socket."""

from __future__ import annotations

import asyncio
import hashlib
import pickle
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from mpo_ray.decoding.protocol import Delta, Diagnostics, GenerationRequest, Mode, Sampling
from mpo_ray.serving.endpoint import create_app
from mpo_ray.serving.errors import ApiError
from mpo_ray.serving.model_ids import parse_model_id
from mpo_ray.serving.neutral import NOT_IMPLEMENTED
from mpo_ray.serving.openai_schema import ChatRequest, CompletionRequest, Mixture
from mpo_ray.serving.plan import mode_of
from mpo_ray.serving.served import Served
from mpo_ray.serving.side_by_side import Batch
from tests.tiny import tiny_tokenizer

OBJECTIVES = ("helpful", "harmless")
DIAGNOSTICS = Diagnostics("token", {"helpful": 0.6, "harmless": 0.4}, log_z=-0.5)


class Recorder:
    """Stands for the replicas: keeps what it was asked for and answers each with two words."""

    def __init__(self) -> None:
        self.asked: list[GenerationRequest] = []

    async def __call__(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[Batch]:
        self.asked = list(requests)
        for index in range(len(requests)):
            yield [(index, Delta((11,), "good"))]
            yield [(index, Delta((9,), " film", finish_reason="stop", diagnostics=DIAGNOSTICS))]


def ask(
    path: str,
    body: dict[str, Any] | None,
    *,
    recorder: Recorder | None = None,
    key: str | None = None,
    sent: str | None = None,
    tokenizer: Any = None,
) -> httpx.Response:
    """One request to an endpoint in this process."""
    digests = () if key is None else (hashlib.sha256(key.encode()).hexdigest(),)
    served = Served("run", OBJECTIVES, context=16, max_tokens=12, key_digests=digests)
    app = create_app(served, tokenizer or tiny_tokenizer(), recorder or Recorder())

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            headers = {} if sent is None else {"Authorization": sent}
            return await client.request("GET" if body is None else "POST", path, json=body, headers=headers)

    return asyncio.run(send())


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "run", "prompt": "the film", **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "run", "messages": [{"role": "user", "content": "good"}], **fields}


def test_what_is_asked_is_what_is_decoded() -> None:
    """Each field reaches the decoder; a field left out, or null, has its documented default."""
    recorder = Recorder()
    fields = {
        "max_tokens": 5, "temperature": 0.3, "top_p": 0.8, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"7": -3}, "seed": 3, "stop": "bad",
        "stop_token_ids": [9], "min_tokens": 2, "ignore_eos": True, "user": "me",
    }  # fmt: skip
    assert ask("/v1/completions", completion(**fields), recorder=recorder).status_code == 200
    [asked] = recorder.asked
    assert asked.prompt_ids == (1, 7, 9)
    assert asked.mode == Mode()
    assert asked.sampling == Sampling(
        5, temperature=0.3, top_p=0.8, top_k=7, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=-0.5, logit_bias={7: -3.0}, seed=3, stop=("bad",), stop_ids=(9,), min_tokens=2,
        ignore_eos=True,
    )  # fmt: skip
    nothing = dict.fromkeys([*fields, "n", "stream", "mixture", "logprobs", "echo"])
    assert ask("/v1/completions", completion(**nothing), recorder=recorder).status_code == 200
    [asked] = recorder.asked
    assert asked.sampling == Sampling(12)
    assert asked.weights is None
    ask("/v1/completions", completion(top_k=-1, logprobs=3, echo=True, max_tokens=0), recorder=recorder)
    assert recorder.asked[0].sampling == Sampling(0, num_logprobs=3, prompt_logprobs=True)
    ask("/v1/chat/completions", chat(logprobs=True, max_completion_tokens=4), recorder=recorder)
    assert recorder.asked[0].sampling == Sampling(4, num_logprobs=0)
    ask("/v1/chat/completions", chat(logprobs=True, top_logprobs=20), recorder=recorder)
    assert recorder.asked[0].sampling.num_logprobs == 20


@pytest.mark.parametrize(
    ("mixture", "mode"),
    [
        ({"log_z": False}, Mode(log_z=False)),
        ({"mode": "exact"}, Mode("smc", 8)),
        ({"mode": "exact", "method": "smc", "particles": 3}, Mode("smc", 3)),
        ({"mode": "exact", "method": "rejection", "max_attempts": 9}, Mode("rejection", 8, 9)),
    ],
)
def test_the_mixture_field_says_what_is_decoded(mixture: dict[str, Any], mode: Mode) -> None:
    recorder = Recorder()
    assert ask("/v1/completions", completion(mixture=mixture), recorder=recorder).status_code == 200
    assert recorder.asked[0].mode == mode


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("the film", [(1, 7, 9)]),
        (["the", "a film"], [(1, 7), (1, 8, 9)]),
        ([7, 9], [(7, 9)]),
        ([[7], [8, 9]], [(7,), (8, 9)]),
    ],
)
def test_a_prompt_is_text_or_token_ids_or_a_list_of_either(prompt: Any, ids: list[tuple[int, ...]]) -> None:
    recorder = Recorder()
    assert ask("/v1/completions", completion(prompt=prompt), recorder=recorder).status_code == 200
    assert [one.prompt_ids for one in recorder.asked] == ids


def test_seeds_of_all_choices_differ_also_from_those_of_other_requests() -> None:
    """The first choice's is the request's own; the others are no neighbours of it, which another request may have."""
    seeds = []
    for seed in (10, 11, 12, -1):
        recorder = Recorder()
        ask("/v1/completions", completion(prompt=["the", "a", "film"], n=4, seed=seed), recorder=recorder)
        seeds += [one.sampling.seed for one in recorder.asked]
        assert seeds[-12] == seed % 2**63
    assert len(set(seeds)) == 48
    assert {1} == {seed is not None and 0 <= seed < 2**63 for seed in seeds}


def test_weights_come_from_the_body_or_the_model_id() -> None:
    recorder = Recorder()
    for fields, expected in [
        ({}, None),
        ({"mixture": {"weights": {"harmless": 1}}}, {"helpful": 0.0, "harmless": 1.0}),
        ({"model": "run@helpful=0.7,harmless=0.3"}, {"helpful": 0.7, "harmless": 0.3}),
        ({"model": "run/harmless", "mixture": {"mode": "token"}}, {"helpful": 0.0, "harmless": 1.0}),
    ]:
        assert ask("/v1/completions", completion(**fields), recorder=recorder).status_code == 200
        assert recorder.asked[0].weights == expected


@pytest.mark.parametrize(
    ("fields", "param", "complaint"),
    [
        ({"temperatur": 1}, "temperatur", "unknown field"),
        ({"suffix": "x"}, "suffix", 'suffix is not implemented by this endpoint; leave it out (got "x")'),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed with stream"),
        ({"max_completion_tokens": 3}, "max_completion_tokens", "unknown field"),
        ({"max_tokens": 13}, "max_tokens", "above this endpoint's limit of 12"),
        ({"mixture": {"mode": "excat"}}, "mixture.mode", "'token' or 'exact'"),
        ({"mixture": {"particles": 16}}, "mixture.particles", "particles belongs to mode 'exact'"),
        ({"mixture": {"number": 16}}, "mixture.number", "unknown field"),
        ({"mixture": {"weights": {"kind": 1}}}, "mixture.weights", "unknown objective 'kind'"),
        ({"mixture": {"weights": {"helpful": -1, "harmless": 2}}}, "mixture.weights", "is -1.0"),
        ({"mixture": {"weights": {"helpful": 0.5}}}, "mixture.weights", "sum to 0.5, not 1"),
        ({"model": "run/helpful", "mixture": {"weights": {"helpful": 1}}}, "mixture.weights", "both give weights"),
        ({"model": "run@helpful"}, "model", "'helpful' is not objective=weight"),
        ({"model": "run@helpful=0.5"}, "model", "sum to 0.5"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [7, 25]}, "prompt", "token id 25 is not in the vocabulary"),
        ({"prompt": ["the"] * 100, "n": 2}, "n", "more than 128 choices"),
        ({"prompt": ["the"] * 129}, "prompt", "129 prompts are more than 128"),
    ],
)
def test_a_wrong_field_is_refused_by_name(fields: dict[str, Any], param: str, complaint: str) -> None:
    answer = ask("/v1/completions", completion(**fields))
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert complaint in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"messages": []}, "at least 1 item"),
        (
            {"messages": [{"role": "wizard", "content": "x"}]},
            "messages.0.role: Input should be one of 'system', 'developer', 'user'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "two names of one limit"),
        ({"tools": [{"type": "function"}]}, "tools is not implemented"),
    ],
)
def test_a_wrong_chat_is_refused(fields: dict[str, Any], complaint: str) -> None:
    answer = ask("/v1/chat/completions", chat(**fields))
    assert answer.status_code == 400
    assert complaint in answer.json()["error"]["message"]


def test_fields_without_effect_are_accepted_with_the_value_that_asks_for_nothing() -> None:
    for key, values in NOT_IMPLEMENTED.items():
        for kind, body in ((CompletionRequest, completion), (ChatRequest, chat)):
            if key in kind.model_fields:
                continue
            for value in (None, *values):
                kind.model_validate(body(**{key: value}))
            with pytest.raises(ValidationError, match=f"{key} is not implemented"):
                kind.model_validate(body(**{key: "something"}))


def test_prompt_and_completion_must_fit_the_context() -> None:
    """16 tokens: a prompt of 15 leaves one, of 16 none; what is asked for must fit as well."""
    recorder = Recorder()
    assert ask("/v1/completions", completion(prompt=[7] * 15), recorder=recorder).status_code == 200
    assert recorder.asked[0].sampling.max_tokens == 1
    for fields, complaint in (
        ({"prompt": [7] * 16}, "it has 16 tokens, and at most 15 are allowed"),
        ({"prompt": [7] * 10, "max_tokens": 7}, "it has 10 tokens, and the completion at least 7"),
    ):
        error = ask("/v1/completions", completion(**fields)).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert complaint in error["message"]
        assert error["message"].startswith("this model's maximum context length is 16 tokens; the prompt is too long: ")


def test_unknown_models_routes_and_methods_are_json_errors() -> None:
    answer = ask("/v1/completions", completion(model="other"))
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert ask("/v1/models/other", None).status_code == 404
    assert ask("/v1/nothing", None).json()["error"]["message"] == "GET /v1/nothing: Not Found"
    assert ask("/v1/completions", None).status_code == 405
    assert "error" in ask("/v1/completions", None).json()


def test_chat_needs_a_chat_template() -> None:
    answer = ask("/v1/chat/completions", chat(), tokenizer=tiny_tokenizer(chat_template=False))
    assert answer.status_code == 400
    assert "no chat template; use /v1/completions" in answer.json()["error"]["message"]


def test_model_ids() -> None:
    served = Served("run", OBJECTIVES, context=16, max_tokens=12)
    assert parse_model_id("run", served) is None
    assert parse_model_id("run@harmless=1", served) == {"helpful": 0.0, "harmless": 1.0}
    with pytest.raises(ApiError) as caught:
        parse_model_id("run/kind", served)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.status, copy.body()) == (404, caught.value.body())


def test_request_models_survive_what_the_wire_may_bring() -> None:
    for body in (b"", b"{", b"[]", b"null", b'{"model": NaN}'):
        app = create_app(Served("run", OBJECTIVES, 16, 12), tiny_tokenizer(), Recorder())

        async def send(app: Any = app, body: bytes = body) -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
                return await client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})

        answer = asyncio.run(send())
        assert answer.status_code == 400, body
        assert answer.json()["error"]["message"]


def test_exact_mode_is_what_the_engine_behind_the_endpoint_can_do() -> None:
    """The default method is the engine's first; another that it lacks is refused before it is asked."""
    served = Served("run", OBJECTIVES, context=16, max_tokens=12, exact_methods=("rejection",))
    assert mode_of(Mixture(mode="exact", particles=3), served) == Mode("rejection", 3)
    assert mode_of(Mixture(mode="exact"), replace(served, exact_methods=("smc", "rejection"))) == Mode("smc", 8)
    with pytest.raises(ApiError, match="draws exact samples by 'rejection' alone") as refused:
        mode_of(Mixture(mode="exact", method="smc"), served)
    assert (refused.value.status, refused.value.param) == (400, "mixture.method")
