"""Requests that are wrong, each with the status and the words of its answer. The table is `BAD`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.serving.live import NAME

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HUGE = 10**400
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Bad:
    """A request, and what its answer is. body: bytes as they are sent"""

    path: str
    body: bytes | None
    status: int
    words: str
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))

    def __str__(self) -> str:
        return f"{self.method} {self.path} {(self.body or b'')[:60]!r}"


def completion(words: str, status: int = 400, **fields: Any) -> Bad:
    body = {"model": NAME, "prompt": "the film", "max_tokens": 4, **fields}
    return Bad(COMPLETIONS, json.dumps(body).encode(), status, words)


def chat(words: str, status: int = 400, **fields: Any) -> Bad:
    body = {"model": NAME, "messages": [{"role": "user", "content": "good"}], "max_tokens": 4, **fields}
    return Bad(CHAT, json.dumps(body).encode(), status, words)


def raw(body: bytes, words: str, path: str = COMPLETIONS, status: int = 400, **headers: str) -> Bad:
    return Bad(path, body, status, words, headers={**JSON, **headers})


def _bodies() -> Iterator[Bad]:
    """What is no JSON object of a bounded size and depth."""
    yield raw(b"", "the body is a JSON object")
    yield raw(b"{", "the body is not JSON")
    yield raw(b"nothing", "the body is not JSON")
    yield raw(b"[]", "the body is a JSON object")
    yield raw(b"null", "the body is a JSON object")
    yield raw(b'"text"', "the body is a JSON object")
    yield raw(b"1", "the body is a JSON object")
    yield raw(b"{'model': 'tiny'}", "the body is not JSON")
    yield raw(b'{"model": "tiny", "prompt": "the",}', "the body is not JSON")
    yield raw(b'{"model": "tiny", "prompt": "the', "the body is not JSON")
    yield raw(b'{"model": "tiny", "prompt": "a\nb"}', "the body is not JSON")
    yield raw(b'{"model": "tiny"} {}', "the body is not JSON")
    yield raw(b"\xff\xfe{\x00}\x00", "the body is not UTF-8")
    yield raw(b'{"model": "tiny", "prompt": "\xff"}', "the body is not UTF-8")
    yield raw(b'{"model": "tiny", "prompt": "\xed\xa0\x80"}', "the body is not UTF-8")
    yield raw(b"[" * 100_000 + b"]" * 100_000, "nested more than 16 deep")
    yield raw(b'{"a":' * 100_000, "nested more than 16 deep")
    yield raw(b'{"model": "tiny", "prompt": ' + b"[" * 40 + b"]" * 40 + b"}", "nested more than 16 deep")
    yield raw(b'{"prompt": "' + b'\\"' * 1_000_000, "the body is not JSON")
    yield raw(b'{"model": "tiny", "prompt": "the", "seed": ' + b"9" * 5000 + b"}", "error parsing the body")
    yield raw(b'{"model": "tiny", "prompt": "' + b"a" * 5_000_000 + b'"}', "larger than 4194304 bytes", status=413)
    yield raw(b" " * 5_000_000, "larger than 4194304 bytes", status=413)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json", ""):
        yield raw(b"{}", "send JSON as application/json", status=415, **{"Content-Type": kind})


def _values() -> Iterator[Bad]:
    """Fields of a wrong type or out of their range, in both kinds of completion."""
    for make in (completion, chat):
        for name, low, high in [
            ("temperature", -0.1, 2.1),
            ("top_p", 0, 1.1),
            ("top_k", -2, 1.5),
            ("min_p", -0.1, 1.1),
            ("repetition_penalty", 0, 11),
            ("presence_penalty", -2.1, 2.1),
            ("frequency_penalty", -2.1, 2.1),
            ("n", 0, 33),
            ("seed", -(2**63) - 1, 2**63),
            ("max_tokens", -1, 41),
            ("min_tokens", -1, 5),
        ]:
            yield make(name if name != "n" else "n", **{name: low})
            yield make(name if name != "n" else "n", **{name: high})
        for name in ("temperature", "top_p", "repetition_penalty", "frequency_penalty"):
            yield make(name, **{name: float("nan")})
            yield make(name, **{name: float("-inf")})
        yield make("seed", seed="7")
        yield make("seed", seed=HUGE)
        yield make("n", n=True)
        yield make("n", n=1.5)
        yield make("max_tokens", max_tokens="4")
        yield make("max_tokens", max_tokens=HUGE)
        yield make("temperature", temperature="0.5")
        yield make("temperature", temperature=True)
        yield make("temperature is 0 (greedy), or from 0.001", temperature=1e-40)
        yield make("stream", stream="true")
        yield make("stream", stream=1)
        yield make("ignore_eos", ignore_eos="no")
        yield make("stop", stop="")
        yield make("stop", stop=["a", ""])
        yield make("stop", stop=[1])
        yield make("stop", stop=["a"] * 17)
        yield make("stop", stop="a" * 257)
        yield make("stop_token_ids", stop_token_ids=[-1])
        yield make("the token id 25 is not in the vocabulary", stop_token_ids=[25])
        yield make("stop_token_ids", stop_token_ids=["</s>"])
        yield make("every token ends the completion", stop_token_ids=[*range(25)], min_tokens=1)
        yield make("logit_bias", logit_bias={"7": 101})
        yield make("'film' is not a token id", logit_bias={"film": 1})
        yield make("'-1' is not a token id", logit_bias={"-1": 1})
        yield make("the token id 25 is not in the vocabulary", logit_bias={"25": 1})
        yield make("logit_bias", logit_bias=[7])
        yield make("every token is banned", logit_bias={str(id): -100 for id in range(25)})
        yield make("only allowed with stream", stream_options={"include_usage": True})
        yield make("continuous_usage_stats needs", stream=True, stream_options={"continuous_usage_stats": True})
        yield make("stream_options", stream=True, stream_options={"everything": True})
        yield make("model", model=7)
        yield make("does not exist", 404, model="other")
        yield make("does not exist", 404, model="")
        yield make("does not exist", 404, model=f"{NAME}/unheard")
        yield make("does not exist", 404, model="../../etc/passwd")
        yield make("is not objective=weight", model=f"{NAME}@helpful")
        yield make("is not objective=weight", model=f"{NAME}@helpful=much")
        yield make("has two weights", model=f"{NAME}@helpful=0.5,helpful=0.5")
        yield make("sum to 0.5", model=f"{NAME}@helpful=0.5")
        yield make("finite", model=f"{NAME}@helpful=nan")
        yield make("unknown field", temperatur=1)


def _mixtures() -> Iterator[Bad]:
    for words, mixture in [
        ("unknown field", {"weight": {}}),
        ("mixture.tools: unknown field", {"tools": []}),
        ("mixture", 7),
        ("mixture", []),
        ("mixture.weights", {"weights": [0.5, 0.5]}),
        ("mixture.weights", {"weights": {"helpful": "1"}}),
        ("mixture.weights", {"weights": {"helpful": float("nan")}}),
        ("mixture.weights", {"weights": {"helpful": float("inf")}}),
        ("all weights are 0", {"weights": {}}),
        ("sum to 0.5", {"weights": {"helpful": 0.5}}),
        ("is -1.0", {"weights": {"helpful": 2, "harmless": -1}}),
        ("unknown objective 'kind'", {"weights": {"kind": 1}}),
        ("'token' or 'exact'", {"mode": "sequence"}),
        ("mixture.mode", {"mode": None, "method": "smc"}),
        ("'smc' or 'rejection'", {"mode": "exact", "method": "mcmc"}),
        ("belongs to mode 'exact'", {"particles": 4}),
        ("belongs to mode 'exact'", {"max_attempts": 4}),
        ("belongs to method 'rejection'", {"mode": "exact", "max_attempts": 4}),
        ("mixture.particles", {"mode": "exact", "particles": 0}),
        ("mixture.particles", {"mode": "exact", "particles": 1025}),
        ("mixture.particles", {"mode": "exact", "particles": "4"}),
        ("17 particles are more sequences than are decoded at a time, 16", {"mode": "exact", "particles": 17}),
        ("mixture.max_attempts", {"mode": "exact", "method": "rejection", "max_attempts": 0}),
        ("leave log_z out", {"mode": "exact", "log_z": False}),
        ("mixture.log_z", {"log_z": "yes"}),
        ("ask for them too", {"policy_logprobs": True}),
    ]:
        yield completion("mixture" if words == "mixture.mode" else words, mixture=mixture)
    exact = {"mode": "exact"}
    for name, value in [("top_p", 0.5), ("top_k", 3), ("min_p", 0.1), ("presence_penalty", 1), ("min_tokens", 2)]:
        yield completion(f"{name} acts on single tokens", mixture=exact, **{name: value})
    yield completion("use a temperature above 0", mixture=exact, temperature=0)
    yield completion("rejection needs weights", mixture=exact | {"method": "rejection"}, temperature=1.5)
    yield completion("both give weights", model=f"{NAME}/helpful", mixture={"weights": {"helpful": 1}})


def _prompts() -> Iterator[Bad]:
    yield Bad(COMPLETIONS, json.dumps({"model": NAME}).encode(), 400, "prompt: Field required")
    for value in ([], [[]], [""] * 129, 7, {}, True, [1, "a"], ["a", 1], [[1], "a"], [1.5], [None], [[[1]]], [-1]):
        yield completion("prompt", prompt=value)
    yield completion("the token id 25 is not in the vocabulary", prompt=[1, 25])
    yield completion("is not in the vocabulary", prompt=[2**40])
    yield completion("prompt", prompt=[HUGE])
    yield completion("at most 63 are allowed", prompt=[7] * 64)
    yield completion("at most 63 are allowed", prompt="the " * 100)
    yield completion("more than 63 tokens", prompt="the " * 100_000)
    yield completion("this model's maximum context length is 64 tokens", prompt=[7] * 62)
    yield completion("half of a surrogate pair", prompt="\ud800")
    yield completion("half of a surrogate pair", prompt=["the", "film \udfff"])
    yield completion("half of a surrogate pair", user="\ud800")
    yield completion("half of a surrogate pair", user="\U0001f600\\\ud83d x")
    yield raw(b'{"model": "tiny", "prompt": "the", "\\ud800": 1}', "half of a surrogate pair")
    yield raw(b'{"model": "\\ud800", "prompt": "the"}', "half of a surrogate pair")
    yield completion("128 choices", prompt=["the"] * 100, n=2)
    yield completion("max_tokens 0 asks for nothing", max_tokens=0)
    for value in (6, -1, True, "1", 1.5):
        yield completion("logprobs", logprobs=value)
    yield completion("echo", echo="yes")
    yield completion("unknown field", top_logprobs=None, messages=[])
    yield completion("best_of is not implemented", best_of=2)
    yield completion("suffix is not implemented", suffix="end")
    yield completion("max_completion_tokens", max_completion_tokens=3)


def _chats() -> Iterator[Bad]:
    yield Bad(CHAT, json.dumps({"model": NAME}).encode(), 400, "messages: Field required")
    for value in ([], {}, "hello", ["hello"], [{}], [{"role": "user"}], [{"content": "x"}], [None], [[]]):
        yield chat("messages", messages=value)
    for message in (
        {"role": "wizard", "content": "x"},
        {"role": "function", "content": "x"},
        {"role": "user", "content": None},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "x", "refusal": "no"},
        {"role": "user", "content": 7},
        {"role": "user", "content": "x", "name": 7},
        {"role": "user", "content": "x", "tool_call_id": "1"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": ["x"]},
        {"role": "assistant", "tool_calls": []},
    ):
        yield chat("messages", messages=[message])
    yield chat("half of a surrogate pair", messages=[{"role": "user", "content": "\ud800"}])
    yield chat("at most 63 are allowed", messages=[{"role": "user", "content": "the " * 100}])
    yield chat("more than 63 tokens", messages=[{"role": "user", "content": "the " * 100_000}])
    yield chat("two names of one limit", max_completion_tokens=3)
    yield chat("max_completion_tokens", max_tokens=None, max_completion_tokens=0)
    yield chat("max_tokens 0", max_tokens=0)
    yield chat("logprobs", logprobs=3)
    yield chat("only allowed with logprobs", top_logprobs=3)
    yield chat("top_logprobs", logprobs=True, top_logprobs=21)
    yield chat("prompt: unknown field", prompt="the")
    for name, value in [
        ("echo", True),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("service_tier", "flex"),
        ("verbosity", "low"),
        ("priority", 1),
        ("priority", False),
        ("skip_special_tokens", False),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "a", "format": "wav"}),
        ("chat_template", "{{ messages }}"),
        ("continue_final_message", True),
        ("store", True),
    ]:
        yield chat(f"{name} is not implemented", **{name: value})


def _others() -> Iterator[Bad]:
    """Tokens, routes and methods."""
    for path, words, body in [
        ("/tokenize", "give prompt or messages", {}),
        ("/tokenize", "give prompt or messages", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", "prompt", {"prompt": 7}),
        ("/tokenize", "half of a surrogate pair", {"prompt": "\ud800"}),
        ("/tokenize", "more than 63 tokens", {"prompt": "a" * 100_000}),
        ("/tokenize", "unknown field", {"prompt": "x", "add_tokens": 1}),
        ("/detokenize", "tokens: Field required", {}),
        ("/detokenize", "tokens", {"tokens": "x"}),
        ("/detokenize", "tokens", {"tokens": [-1]}),
        ("/detokenize", "not in the vocabulary", {"tokens": [25]}),
        ("/detokenize", "not in the vocabulary", {"tokens": [2**70]}),
        ("/detokenize", "at most 63", {"tokens": [7] * 64}),
    ]:
        yield raw(json.dumps(body).encode(), words, path)
    yield raw(b'{"model": "other", "prompt": "x"}', "does not exist", "/tokenize", 404)
    for method, path, status in [
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/", 405),
        ("GET", "/docs", 404),
        ("GET", "/v1/completions/", 405),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/v1/models/%00%ff", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", COMPLETIONS, 405),
        ("PUT", COMPLETIONS, 405),
        ("DELETE", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("POST", "/health", 405),
        ("PATCH", "/tokenize", 405),
        ("OPTIONS", COMPLETIONS, 405),
    ]:
        yield Bad(path, None, status, "", method)


BAD = [*_bodies(), *_values(), *_mixtures(), *_prompts(), *_chats(), *_others()]
