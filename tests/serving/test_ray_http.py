"""Around Ray's own HTTP layers: one request id, and errors in the API's form."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from ray.serve._private.http_util import _apply_middlewares

from mpo_ray.serving.ray_http import middlewares
from tests.serving.live import ask
from tests.serving.test_gate import app, digest


def below_ray(inner: Any) -> Any:
    """As Ray's proxies and ingresses call an application."""
    return _apply_middlewares(inner, middlewares())


@pytest.mark.parametrize("sent", [[], ["an id"], ["x" * 65], ['x"\ty'], ["näh"], ["a", "b"], [""]])
def test_a_request_id_comes_once_and_an_unfit_one_is_not_sent_back(sent: list[str]) -> None:
    here = below_ray(app(key_digests=(digest("k"),)))
    for path in ("/health", "/none", "/-/routes"):
        headers = [(b"x-request-id", id.encode()) for id in sent]
        ids = ask(here, "GET", path, headers=headers).headers.get_list("x-request-id")
        assert len(ids) == (path != "/-/routes"), ids
        assert not set(ids) & set(sent)


def test_a_fit_request_id_comes_back_once() -> None:
    answer = ask(below_ray(app()), "GET", "/v1/models", headers={"X-Request-Id": "my-id.1"})
    assert answer.headers.get_list("x-request-id") == ["my-id.1"]


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (404, "not_found_error", None),
        (408, "timeout_error", "request_timeout"),
        (503, "service_unavailable_error", "not_ready"),
        (500, "server_error", None),
        (400, "invalid_request_error", None),
    ],
)
def test_ray_s_own_errors_have_the_api_s_form(status: int, kind: str, code: str | None) -> None:
    """Ray writes plain text, with the names of deployments or a traceback in it."""
    inner = FastAPI()

    @inner.get("/v1/models")
    async def refuse() -> PlainTextResponse:
        return PlainTextResponse("Traceback of a secret", status, headers={"Retry-After": "7"})

    answer = ask(below_ray(inner), "GET", "/v1/models")
    assert answer.status_code == status
    assert (answer.json()["error"]["type"], answer.json()["error"]["code"]) == (kind, code)
    assert "secret" not in answer.text
    assert answer.headers["retry-after"] == "7"
    assert len(answer.headers.get_list("x-request-id")) == 1


def test_the_names_of_the_applications_are_not_told() -> None:
    inner = FastAPI()
    inner.add_api_route("/-/routes", lambda: {"/": "mine"})
    for path in ("/-/routes", "/-/routes/"):
        answer = ask(below_ray(inner), "GET", path)
        assert answer.status_code == 404
        assert "mine" not in answer.text
