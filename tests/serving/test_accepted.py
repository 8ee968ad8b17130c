"""What clients send by default, write out, or send back is taken: it asks for nothing that is not done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpo_ray.serving.openai_schema import ChatRequest, CompletionRequest, TokenizeRequest
from tests.serving.live import Live, ask
from tests.serving.test_fields import Recorder, chat, completion
from tests.serving.test_fields import ask as ask_recorder

CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"place": null, "n": [1]}'}}
READ_CALL = CALL | {"function": {"name": "look", "arguments": {"place": None, "n": [1]}}}
NULLS = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls", "name", "reasoning_content"))


def test_the_rows_of_real_clients(shared: Path, live: Live) -> None:
    """Each is answered; what asks for JSON is refused by the name of its field; the completion keeps its space."""
    rows = [json.loads(line) for line in (shared / "cases/endpoint/requests.jsonl").read_text().splitlines()]
    assert len(rows) >= 8
    app = live.app(name="quickstart")
    for row in rows:
        answer = ask(app, "POST", row["path"], json=row["body"])
        if row["case"] == "param null":
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "response_format"
            continue
        assert answer.status_code == 200, (row["case"], answer.text)
        if row["case"] == "space lost":
            text = answer.json()["choices"][0]["text"]
            assert text.startswith(f"{row['body']['prompt']} ")
            assert "  " not in text


@pytest.mark.parametrize(
    "fields",
    [
        {"skip_special_tokens": True, "spaces_between_special_tokens": True, "include_stop_str_in_output": False},
        {"tool_choice": "auto", "tools": [], "parallel_tool_calls": True},
        {"tool_choice": "none", "functions": [], "function_call": "auto", "parallel_tool_calls": False},
        {"priority": 0, "length_penalty": 1, "early_stopping": False, "use_beam_search": False, "best_of": 1, "n": 1},
        {"length_penalty": 1.0, "priority": 0.0},
        {"service_tier": "auto", "store": False, "verbosity": "medium"},
        {"service_tier": "default", "modalities": ["text"]},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "text", "json_schema": None}},
        {"metadata": {}, "user": "me", "safety_identifier": "me", "prompt_cache_key": "here"},
        {"metadata": {"a": "b", "c": None}},
        {"logit_bias": {}, "stop": [], "stop_token_ids": [], "bad_words": []},
        {"logit_bias": {"7": None, "8": 1.5}},
        {"stream_options": {}},
        {"stream_options": {"include_usage": False, "include_obfuscation": None}},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False, "other": None}},
        {"verbosity": None, "anything": None, "top-k": None},
        {"mixture": {"weights": None, "tools": None}},
        {"mixture": {"weights": {"helpful": 1.0, "harmless": None}, "particles": None}},
        {"return_token_ids": False, "prompt_logprobs": None, "chat_template_kwargs": {}, "documents": []},
        {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "temperature": 1, "presence_penalty": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["completions", "chat/completions"])
def test_a_field_that_asks_for_nothing_is_taken(kind: str, fields: dict[str, Any]) -> None:
    body = completion(**fields) if kind == "completions" else chat(**fields)
    assert ask_recorder(f"/v1/{kind}", body).status_code == 200


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest, TokenizeRequest])
def test_null_asks_for_nothing_in_every_field(kind: Any) -> None:
    """Of the request, of every object in it, known or not."""
    needed = {"messages": [{"role": "user", "content": "good"}]} if kind is ChatRequest else {"prompt": "the film"}
    body = {"model": "run", **needed}
    plain = kind.model_validate(body)
    for name in [*kind.model_fields, *kind.not_implemented, "unheard_of"]:
        if name not in body:
            assert kind.model_validate(body | {name: None}) == plain, name
    if kind is not TokenizeRequest:
        nothing = dict.fromkeys(["weights", "mode", "method", "particles", "max_attempts", "log_z", "unheard_of"])
        assert kind.model_validate(body | {"mixture": nothing}) == plain


def test_both_limits_may_have_one_value() -> None:
    for fields in ({"max_tokens": 5, "max_completion_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 5}):
        recorder = Recorder()
        assert ask_recorder("/v1/chat/completions", chat(**fields), recorder=recorder).status_code == 200
        assert recorder.asked[0].sampling.max_tokens == 5


def test_best_of_as_many_as_there_are_choices_asks_for_nothing() -> None:
    recorder = Recorder()
    assert ask_recorder("/v1/completions", completion(n=3, best_of=3), recorder=recorder).status_code == 200
    assert len(recorder.asked) == 3


@pytest.mark.parametrize(
    ("message", "read"),
    [
        ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
        ({"role": "user", "content": "x", "name": "ann"}, {"role": "user", "content": "x", "name": "ann"}),
        ({"role": "assistant", "content": "x", **NULLS}, {"role": "assistant", "content": "x"}),
        (
            {"role": "assistant", "content": "x", "annotations": [], "tool_calls": [], "unheard_of": None},
            {"role": "assistant", "content": "x"},
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}] * 2},
            {"role": "user", "content": "aa"},
        ),
        (
            {"role": "system", "content": "x", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
            {"role": "system", "content": "x"},
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL | {"index": 0}]},
            {"role": "assistant", "content": "", "tool_calls": [READ_CALL]},
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": ""}}]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}],
            },
        ),
        (
            {"role": "tool", "content": "x", "tool_call_id": "call_1"},
            {"role": "tool", "content": "x", "tool_call_id": "call_1"},
        ),
        (
            {"role": "assistant", "content": "x", "reasoning_content": "because"},
            {"role": "assistant", "content": "x", "reasoning_content": "because"},
        ),
    ],
    ids=str,
)
def test_a_message_reaches_the_template_as_it_was_meant(message: dict[str, Any], read: dict[str, Any]) -> None:
    """With every key that a template may read, and none that says nothing."""
    [parsed] = ChatRequest.model_validate({"model": "run", "messages": [message]}).messages
    assert parsed.for_template() == read


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "content": None}, "messages.0.content"),
        ({"role": "assistant", "content": None, "tool_calls": [], "refusal": None}, "messages.0.content"),
        ({"role": "tool", "tool_call_id": "call_1"}, "messages.0.content"),
        ({"role": "assistant", "content": "x", "refusal": "no"}, "messages.0.refusal"),
        ({"role": "assistant", "content": "x", "annotations": [{"type": "url_citation"}]}, "messages.0.annotations"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "messages.0.audio"),
        ({"role": "assistant", "content": "", "function_call": {"name": "f"}}, "messages.0.function_call"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages.0.tool_calls"),
        ({"role": "user", "content": "x", "tool_call_id": "call_1"}, "messages.0.tool_call_id"),
        ({"role": "user", "content": "x", "reasoning_content": "because"}, "messages.0.reasoning_content"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
        ({"role": "assistant", "tool_calls": [{"type": "function"}]}, "messages.0.tool_calls.0.function"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "x"}}]}, "messages.0"),
        ({"role": "user", "content": "x", "weight-1": 1}, "messages.0.weight-1"),
    ],
    ids=str,
)
def test_a_message_that_asks_for_more_is_refused_by_name(message: dict[str, Any], param: str) -> None:
    answer = ask_recorder("/v1/chat/completions", chat(messages=[message]))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)
