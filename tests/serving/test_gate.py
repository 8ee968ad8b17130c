"""Keys, rates, request ids, the access log, and every status with its message."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import logging
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from ray.exceptions import RayTaskError

from mpo_ray.decoding.protocol import (
    Delta,
    Diagnostics,
    EngineError,
    GenerationRequest,
    NothingAcceptedError,
    QueueFullError,
    RequestError,
)
from mpo_ray.serving import body_check
from mpo_ray.serving.endpoint import create_app
from mpo_ray.serving.errors import ApiError
from mpo_ray.serving.keys import NO_KEY, Keys, RateLimit
from mpo_ray.serving.served import Served
from mpo_ray.serving.side_by_side import Batch
from tests.serving.live import ask
from tests.tiny import tiny_tokenizer

BODY = {"model": "run", "prompt": "the film"}
DONE = Delta((9,), " film", finish_reason="stop", diagnostics=Diagnostics("token", {"helpful": 1.0}))
COMPLETIONS = "/v1/completions"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def app(*steps: Delta | Exception | float, check_health: Any = None, **limits: Any) -> FastAPI:
    """An endpoint whose engine says these things to each completion. A number: seconds that it takes its time"""

    async def generate(requests: Sequence[GenerationRequest]) -> AsyncGenerator[Batch]:
        for step in steps or (DONE,):
            if isinstance(step, Exception):
                raise step
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                yield [(number, step) for number in range(len(requests))]

    served = Served("run", ("helpful",), **({"context": 16, "max_tokens": 12} | limits))
    return create_app(served, tiny_tokenizer(), generate, check_health=check_health)


def test_any_of_several_keys_opens_every_route() -> None:
    """401 in JSON otherwise, for a wrong body or an unknown route too; /health is open."""
    here = app(key_digests=(digest("one"), digest("two").upper()))
    for sent in (None, "one", "Bearer", "Bearer ", "Bearer other", "Basic one", f"Bearer {digest('one')}", "Bearer é"):
        headers = {} if sent is None else {"Authorization": sent.encode("latin-1")}
        for method, path in [("POST", COMPLETIONS), ("GET", "/v1/models"), ("GET", "/none"), ("GET", "/openapi.json")]:
            answer = ask(here, method, path, headers=headers)
            assert answer.status_code == 401, (sent, path)
            assert answer.json()["error"] == {
                "message": "send the API key as `Authorization: Bearer KEY`; it is missing or wrong.",
                "type": "authentication_error",
                "param": None,
                "code": "invalid_api_key",
            }
            assert answer.headers["www-authenticate"] == "Bearer"
    for key in ("one", "two"):
        assert ask(here, "POST", COMPLETIONS, json=BODY, headers={"Authorization": f"bearer {key}"}).status_code == 200
    assert ask(here, "GET", "/health").json() == {"status": "ok"}


def test_below_a_prefix_the_same_routes_are_open_and_the_same_bodies_are_checked() -> None:
    here = app(key_digests=(digest("k"),), max_body=10)

    async def send(method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(here, root_path="/below")
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, f"/below{path}", **options)

    assert asyncio.run(send("GET", "/health")).status_code == 200
    assert asyncio.run(send("GET", "/v1/models")).status_code == 401
    headers = {"Authorization": "Bearer k"}
    assert asyncio.run(send("GET", "/v1/models", headers=headers)).status_code == 200
    assert asyncio.run(send("POST", COMPLETIONS, headers=headers, json=BODY)).status_code == 413


def test_a_key_is_compared_with_every_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after one that fits: the time tells nothing of which it was."""
    compared = []
    import hmac

    monkeypatch.setattr(hmac, "compare_digest", lambda one, other: compared.append(other) or one == other)
    digests = tuple(digest(key) for key in "abc")
    assert Keys(digests).owner("Bearer a") == digests[0]
    assert compared == list(digests)
    assert Keys(()).owner(None) == NO_KEY


def test_each_key_has_its_own_rate() -> None:
    """A bucket of 2 that fills up by one in 30 s; what is refused says when to come again."""
    now = [0.0]
    limit = RateLimit(2, clock=lambda: now[0])
    for owner in ("a", "b"):
        limit.take(owner)
        limit.take(owner)
        with pytest.raises(ApiError) as refused:
            limit.take(owner)
        assert (refused.value.status, refused.value.headers()["Retry-After"]) == (429, "30")
    now[0] = 29.0
    with pytest.raises(ApiError, match="try again in 1 s"):
        limit.take("a")
    now[0] = 30.0
    limit.take("a")
    now[0] = math.inf
    RateLimit(None).take("a")
    here = app(requests_per_minute=2)
    assert [ask(here, "GET", "/v1/models").status_code for _ in range(3)] == [200, 200, 429]
    assert ask(here, "GET", "/health").status_code == 200


@pytest.mark.parametrize(
    ("make", "status", "kind", "message", "retry"),
    [
        (lambda: app(RequestError("no such thing.", "stop_ids")), 400, "invalid_request_error", "no such thing.", None),
        (lambda: app(1.0, timeout_s=0.05), 408, "timeout_error", "took longer than this endpoint allows", None),
        (lambda: app(Delta((7,), "a"), 1.0, timeout_s=0.05), 408, "timeout_error", "ask for fewer tokens", None),
        (lambda: app(max_body=10), 413, "invalid_request_error", "larger than 10 bytes", None),
        (lambda: app(NothingAcceptedError("9 attempts")), 422, "invalid_request_error", "9 attempts", None),
        (lambda: app(QueueFullError("8 wait")), 429, "rate_limit_error", "too many requests are waiting", "1"),
        (lambda: app(ApiError(429, "full", retry_after=7)), 429, "rate_limit_error", "full", "7"),
        (lambda: app(EngineError("secret")), 503, "service_unavailable_error", "the engine could not go on", "5"),
        (lambda: app(Delta((7,), "a"), EngineError("secret")), 503, "service_unavailable_error", "could not", "5"),
        (lambda: app(RuntimeError("secret")), 500, "server_error", "under the request id my-id", None),
    ],
)
def test_each_status_has_its_message(
    make: Callable[[], FastAPI], status: int, kind: str, message: str, retry: str | None
) -> None:
    """Never the text of an error that was not made for clients."""
    answer = ask(make(), "POST", COMPLETIONS, json=BODY, headers={"X-Request-Id": "my-id"})
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert error["type"] == kind
    assert message in error["message"]
    assert "secret" not in answer.text
    assert answer.headers.get("retry-after") == retry


@pytest.mark.parametrize(
    ("cause", "status"),
    [(RequestError("9 wrong.", "stop_ids"), 400), (NothingAcceptedError("9 attempts"), 422), (EngineError("9"), 503)],
)
def test_an_error_of_a_replica_is_answered_like_one_of_this_process(cause: Exception, status: int) -> None:
    """Ray wraps it, together with its traceback, which no client sees."""
    wrapped = RayTaskError("generate", "Traceback: secret", cause).as_instanceof_cause()
    answer = ask(app(wrapped), "POST", COMPLETIONS, json=BODY)
    assert answer.status_code == status
    assert status == 503 or answer.json()["error"]["message"] == str(cause)
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    ("steps", "code", "words"),
    [
        ((EngineError("secret"),), "engine_error", "the engine could not go on"),
        ((RuntimeError("secret"),), None, "under the request id my-id"),
        ((1.0,), "request_timeout", "took longer"),
    ],
)
def test_an_error_after_the_first_byte_is_an_event(steps: tuple[Any, ...], code: str | None, words: str) -> None:
    here = app(Delta((7,), "good"), *steps, timeout_s=0.1)
    answer = ask(here, "POST", COMPLETIONS, json=BODY | {"stream": True}, headers={"X-Request-Id": "my-id"})
    assert answer.status_code == 200
    *_, first, last = answer.text.strip().split("\n\n")
    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == "good"
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["code"] == code
    assert words in error["message"]
    assert "secret" not in answer.text
    assert "[DONE]" not in answer.text


def test_an_error_before_the_first_byte_is_a_status_for_a_stream_too() -> None:
    answer = ask(app(QueueFullError("8 wait")), "POST", COMPLETIONS, json=BODY | {"stream": True})
    assert answer.status_code == 429


def test_an_unhealthy_engine_is_503() -> None:
    async def stuck() -> None:
        raise EngineError("the engine has been in one step for 130 s.")

    answer = ask(app(check_health=stuck), "GET", "/health")
    assert answer.status_code == 503
    assert "not healthy: the engine has been in one step" in answer.json()["error"]["message"]


@pytest.mark.parametrize("limit", ["max_prompts", "max_n", "max_choices", "max_work", "max_prompt_tokens"])
def test_each_limit_is_kept(limit: str) -> None:
    """With just as much as asked for the answer is 200, with less 400."""
    body = BODY | {"prompt": ["the film"] * 3, "n": 3, "max_tokens": 4}
    needed = {"max_prompts": 3, "max_n": 3, "max_choices": 9, "max_work": 36, "max_prompt_tokens": 3}[limit]
    assert ask(app(**{limit: needed}), "POST", COMPLETIONS, json=body).status_code == 200
    answer = ask(app(**{limit: needed - 1}), "POST", COMPLETIONS, json=body)
    assert answer.status_code == 400
    assert str(needed - 1) in answer.json()["error"]["message"]


@pytest.mark.parametrize("sent", [None, "a b", "x" * 65, 'x"\ty', "näh"])
def test_every_answer_has_a_request_id(sent: str | None) -> None:
    """The client's own if it is short and safe, else a new one; for errors too."""
    here = app(key_digests=(digest("k"),))
    headers = {} if sent is None else {"X-Request-Id": sent.encode()}
    made = {ask(here, "GET", path, headers=headers).headers["x-request-id"] for path in ("/health", "/none")}
    assert len(made) == 2
    assert all(len(id) == 32 for id in made)
    assert ask(here, "GET", "/none", headers={"X-Request-Id": "my-id.1"}).headers["x-request-id"] == "my-id.1"


def test_head_is_answered_where_get_is_without_a_body() -> None:
    here = app(key_digests=(digest("k"),))
    for path in ("/health", "/", "/v1/models", "/none"):
        headers = {"Authorization": "Bearer k"}
        got, head = (ask(here, method, path, headers=headers) for method in ("GET", "HEAD"))
        assert head.status_code == got.status_code
        assert head.content == b""
        assert head.headers["content-length"] == got.headers["content-length"] == str(len(got.content))
    assert ask(here, "HEAD", "/v1/models").status_code == 401
    assert ask(here, "HEAD", COMPLETIONS, headers=headers).status_code == 405


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/run", "/health", COMPLETIONS, "/page/page.css"])
def test_a_slash_at_the_end_of_a_path_changes_nothing(path: str) -> None:
    method, options = ("POST", {"json": BODY}) if path == COMPLETIONS else ("GET", {})
    here = app()
    plain, slashed = (ask(here, method, one, **options) for one in (path, f"{path}/"))
    assert plain.status_code == slashed.status_code == 200
    assert plain.content == slashed.content or path == COMPLETIONS
    closed = app(key_digests=(digest("k"),))
    assert ask(closed, method, f"{path}/", **options).status_code == (401 if path.startswith("/v1") else 200)


def gzipped(body: Any, **headers: str) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else gzip.compress(json.dumps(body).encode())
    return {"content": content, "headers": {"Content-Type": "application/json", "Content-Encoding": "gzip", **headers}}


def test_a_body_may_be_gzip() -> None:
    """Also of several members, which is one by the standard; other encodings are told by name."""
    here, text = app(), json.dumps(BODY).encode()
    expected = ask(here, "POST", COMPLETIONS, json=BODY).json()["usage"]
    members = gzip.compress(text[:9]) + gzip.compress(text[9:])
    sent = [gzipped(BODY), gzipped(members), gzipped(BODY, **{"Content-Encoding": "X-GZIP"})]
    for options in [*sent, gzipped(text, **{"Content-Encoding": "identity"})]:
        answer = ask(here, "POST", COMPLETIONS, **options)
        assert (answer.status_code, answer.json().get("usage")) == (200, expected), answer.text
    for encoding in ("br", "zstd", "deflate", "gzip, gzip"):
        answer = ask(here, "POST", COMPLETIONS, **gzipped(BODY, **{"Content-Encoding": encoding}))
        assert answer.status_code == 415
        assert encoding in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 400, "ends too early"),
        (gzip.compress(json.dumps(BODY).encode())[:-5], 400, "ends too early"),
        (json.dumps(BODY).encode(), 400, "is not gzip"),
        (gzip.compress(b"{}") + b"rest", 400, "is not gzip"),
        (gzip.compress(b" " * 100_000), 413, "larger than 1000 bytes"),
        (gzip.compress(b" " * 600) * 2, 413, "larger than 1000 bytes"),
        (gzip.compress(b"[" * 900), 400, "nested more than 16 deep"),
    ],
    ids=["nothing", "cut", "plain", "with a rest", "large", "large in two", "nested"],
)
def test_gzip_that_is_damaged_or_too_large_is_refused(content: bytes, status: int, words: str) -> None:
    answer = ask(app(max_body=1000), "POST", COMPLETIONS, **gzipped(content))
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_a_body_that_stalls_or_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that come in time are waited for: a large body has longer."""
    monkeypatch.setattr(body_check, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(body_check, "BYTES_PER_SECOND", 100)

    text = json.dumps(BODY | {"user": "x" * 600}).encode()

    async def send(pause: float, size: int) -> tuple[int, bytes]:
        parts = [text[start : start + size] for start in range(0, len(text), size)]
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.sleep(pause)
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def keep(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "query_string": b"", "headers": headers}
        await app()(scope, receive, keep)
        return sent[0]["status"], sent[1]["body"]

    for pause, size in ((30.0, 10), (0.05, 1)):
        status, answer = asyncio.run(send(pause, size))
        assert status == 408
        assert json.loads(answer)["error"]["code"] == "body_timeout"
    assert asyncio.run(send(0.1, 100))[0] == 200


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="mpo_ray.access"):
        yield caplog


def test_the_access_log_has_a_line_per_request_and_nothing_of_its_contents(log: pytest.LogCaptureFixture) -> None:
    here = app(key_digests=(digest("a-secret-key"),))
    headers = {"Authorization": "Bearer a-secret-key", "X-Request-Id": "id-1"}
    ask(here, "POST", COMPLETIONS, json=BODY | {"prompt": "private words", "n": 2}, headers=headers)
    ask(here, "GET", "/v1/models/private", headers=headers)
    ask(here, "GET", "/private", headers=headers | {"Authorization": "Bearer wrong"})
    lines = [record.getMessage() for record in log.records if record.name == "mpo_ray.access"]
    assert len(lines) == 3
    assert lines[0].startswith("id=id-1 method=POST route=/v1/completions status=200 ms=")
    assert lines[0].endswith(" tokens=2")
    assert "route=/v1/models/{model:path} status=404" in lines[1]
    assert "route=- status=401" in lines[2]
    assert not any(word in log.text for word in ("private", "secret", "wrong", "film"))


def test_other_origins_are_only_let_in_where_they_are_named() -> None:
    origin = {"Origin": "https://page.example"}
    assert "access-control-allow-origin" not in ask(app(), "GET", "/health", headers=origin).headers
    here = app(allowed_origins=("https://page.example",), key_digests=(digest("k"),))
    preflight = origin | {"Access-Control-Request-Method": "POST"}
    answer: httpx.Response = ask(here, "OPTIONS", COMPLETIONS, headers=preflight)
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    other = ask(here, "GET", "/health", headers={"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
