"""schemathesis, over the endpoint's own OpenAPI document: what it allows is answered as it says, the rest refused."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.serving.live import NAME, Live, serving

KEY = "a-key-for-tests"
ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/health"),
    ("GET", "/version"),
    ("GET", "/metrics"),
]
#: What fits its schema may be refused for what no schema says: an unknown model, a prompt that is too long.
UNCHECKED = [positive_data_acceptance]


@pytest.fixture(scope="module")
def document(live: Live) -> Iterator[Any]:
    """The document of an endpoint that asks for a key."""
    app = live.app(key_digests=(hashlib.sha256(KEY.encode()).hexdigest(),))
    with serving(app) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"})


def within_limits(case: Case) -> None:
    """Let a request that fits its schema go as far as the engine, mostly."""
    if case.path_parameters and len(case.path_parameters["model"]) % 2 == 0:
        case.path_parameters["model"] = NAME
    if not isinstance(case.body, dict):
        return
    if isinstance(case.body.get("model"), str):
        case.body["model"] = NAME
    for name, limit in (("max_tokens", 8), ("max_completion_tokens", 8), ("min_tokens", 8), ("n", 3)):
        value = case.body.get(name)
        if isinstance(value, int) and value > limit:
            case.body[name] = limit


#: What goes with every request; a busy machine gets more than the 10 s that are schemathesis' own.
ASKED = {"headers": {"Authorization": f"Bearer {KEY}"}, "excluded_checks": UNCHECKED, "timeout": 60}


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_the_document_is_true(document: Any, method: str, path: str) -> None:
    """No 5xx; documented statuses, content types and bodies; what breaks a schema is refused; without the key 401."""
    operation = document[path][method]
    seen: Counter[int] = Counter()
    modes = [GenerationMode.POSITIVE] + [GenerationMode.NEGATIVE] * (method == "POST")
    for mode in modes:

        @seed(20261121)
        @settings(
            max_examples=40 if method == "POST" else 5,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Case) -> None:
            within_limits(case)
            answer = case.call_and_validate(**ASKED)
            seen[answer.status_code] += 1

        ask()
    assert seen[200] > (5 if method == "POST" else 0)
    assert seen[400] > 10 or method == "GET"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "the film"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "good"}]}),
    ],
)
def test_a_stream_is_as_documented(document: Any, path: str, body: dict[str, Any]) -> None:
    case = document[path]["POST"].Case(
        body={"model": NAME, "stream": True, "max_tokens": 3, **body}, media_type="application/json"
    )
    answer = case.call_and_validate(**ASKED)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == ["text/event-stream; charset=utf-8"]


def test_every_error_is_documented_in_one_form(live: Live) -> None:
    paths = live.http.get("/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path, methods in paths.items() for method in methods} == set(ROUTES)
    for path, operations in paths.items():
        for operation in operations.values():
            errors = {status: body for status, body in operation["responses"].items() if status != "200"}
            assert {body["content"]["application/json"]["schema"]["$ref"] for body in errors.values()} == {
                "#/components/schemas/ErrorBody"
            }
            assert ("401" in errors) == (path != "/health")
