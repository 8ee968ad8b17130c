"""The `openai` client, with strict validation of every answer, over every route; it was written by others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import Completion

from tests.serving.live import NAME, PROMPT, WEIGHTS, Live

MESSAGES: list[Any] = [
    {"role": "system", "content": "short"},
    {"role": "user", "content": [{"type": "text", "text": "the film"}, {"type": "text", "text": " was"}]},
]


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{live.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def test_models(client: openai.OpenAI, live: Live) -> None:
    ids = [model.id for model in client.models.list()]
    policies = [*WEIGHTS, *(["reference"] if live.served.has_reference else [])]
    assert ids == [NAME, *(f"{NAME}/{policy}" for policy in policies)]
    for id in [*ids, f"{NAME}@helpful=0.25,harmless=0.75"]:
        assert client.models.retrieve(id).id == id


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "seed": 5, "stop": ["good", "bad film"]},
        {"logprobs": 5},
        {"logprobs": 0},
        {"echo": True},
        {"echo": True, "max_tokens": 0},
        {"prompt": [[1, 7], [1, 8, 9]], "n": 2},
        {"model": f"{NAME}/harmless", "temperature": 0.0},
        {"extra_body": {"mixture": {"mode": "exact", "particles": 4}}},
        {"extra_body": {"mixture": {"mode": "exact", "method": "rejection"}}, "max_tokens": 2},
        {"logprobs": 2, "extra_body": {"mixture": {"policy_logprobs": True}, "top_k": 5, "ignore_eos": True}},
    ],
    ids=str,
)
def test_completions_plain_and_streamed(client: openai.OpenAI, fields: dict[str, Any], engine_name: str) -> None:
    if engine_name == "vllm" and "policy_logprobs" in str(fields):
        pytest.skip("vLLM does not tell the policies' own log-probabilities; tests/vllm_plugin has the refusal")
    asked: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": 6, "seed": 1} | fields
    whole = client.completions.create(**asked)
    streamed: dict[int, str] = {}
    finish: dict[int, Any] = {}
    usage = None
    lenient = client.copy(_extra_kwargs={"_strict_response_validation": False})
    for chunk in lenient.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        # the client's type of a completion forbids the null that OpenAI itself sends while a choice goes on
        ended = [choice.to_dict() | {"finish_reason": choice.finish_reason or "stop"} for choice in chunk.choices]
        Completion.model_validate(chunk.to_dict() | {"choices": ended})
        usage = chunk.usage or usage
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
            finish[choice.index] = choice.finish_reason or finish.get(choice.index)
    assert [streamed[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]
    assert [finish[choice.index] for choice in whole.choices] == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    exact = fields.get("extra_body", {}).get("mixture", {}).get("mode") == "exact"
    for choice in whole.choices:
        report = choice.model_extra["mixture"]
        assert report["mode"] == ("exact" if exact else "token")
        assert set(report["weights"]) == set(WEIGHTS)
        assert (report["log_z"] is None) == (asked["max_tokens"] == 0)
        assert (report["log_z_hat"] is None) != exact


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2, "stop": "good"},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 20},
        {"max_tokens": None, "max_completion_tokens": 3, "frequency_penalty": 1.0},
        {"extra_body": {"mixture": {"mode": "exact", "particles": 2}}},
    ],
    ids=str,
)
def test_chat_completions_plain_and_streamed(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "max_tokens": 6, "seed": 1} | fields
    whole = client.chat.completions.create(**asked)
    texts: dict[int, str] = {}
    tokens: dict[int, list[Any]] = {}
    for chunk in client.chat.completions.create(**asked, stream=True):
        [choice] = chunk.choices
        if choice.index not in texts:
            assert choice.delta.role == "assistant"
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        if choice.logprobs is not None:
            tokens.setdefault(choice.index, []).extend(choice.logprobs.content or [])
    assert [texts[choice.index] for choice in whole.choices] == [choice.message.content for choice in whole.choices]
    for choice in whole.choices:
        assert (choice.logprobs is not None) == bool(fields.get("logprobs"))
        if choice.logprobs is not None:
            assert choice.logprobs.content == tokens[choice.index]
            assert {len(token.top_logprobs) for token in choice.logprobs.content or []} == {
                fields.get("top_logprobs", 0)
            }


def test_a_message_of_an_answer_goes_back_unchanged(client: openai.OpenAI) -> None:
    """As the client's object, as what it dumps with all its nulls, as JSON, and as a stream adds it up."""
    asked: dict[str, Any] = {"model": NAME, "max_tokens": 4, "seed": 1, "stop": " "}
    question = MESSAGES[0]
    message = client.chat.completions.create(messages=[question], **asked).choices[0].message
    dumped = message.model_dump()
    assert None in dumped.values()
    with client.chat.completions.stream(messages=[question], **asked) as stream:
        streamed = stream.get_final_completion().choices[0].message
    said = []
    for again in (message, dumped, message.model_dump(mode="json", exclude_unset=True), streamed.model_dump()):
        answer = client.chat.completions.create(messages=[question, again, *MESSAGES], **asked)
        said.append(answer.choices[0].message.content)
    assert len(set(said)) == 1


def test_the_client_knows_the_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model=NAME, prompt=PROMPT, max_tokens=1000)
    assert wrong.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.models.retrieve("other")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.UnprocessableEntityError, match="was accepted"):
        client.completions.create(
            model=NAME,
            prompt=PROMPT,
            extra_body={"mixture": {"mode": "exact", "method": "rejection", "max_attempts": 1}},
            seed=1,
        )
