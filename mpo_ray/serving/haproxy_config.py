"""What `mpo-ray-haproxy` changes in the configuration that Ray wrote for HAProxy. Nothing here imports Ray."""

from __future__ import annotations

import json
import re
from http import HTTPStatus
from pathlib import Path

#: Seconds in which a request's head, and its body up to HAProxy's buffer, have to come.
REQUEST_SECONDS = 10
#: Answers of HAProxy itself, in the form of the API's (`ApiError.body`): status → message, type, code.
ANSWERS = {
    400: ("this is not a valid HTTP request.", "invalid_request_error", "not_http"),
    404: ("nothing is served at this path.", "not_found_error", None),
    408: ("the request did not come in time; send it again.", "timeout_error", "request_timeout"),
    503: ("the endpoint is not ready; try again later.", "service_unavailable_error", "not_ready"),
}
RETRY_AFTER = 5
_DEFAULT_ANSWER = re.compile(r'(?m)^    http-request return status 404 content-type text/plain lf-string "Path .*$')


def write_hardened(path: Path, *, public_host: str | None, max_connections: int | None) -> None:
    """Change the configuration in this file (`hardened`), and write HAProxy's own answers beside it."""
    for status in ANSWERS:
        path.with_name(f"{status}.http").write_bytes(answer(status))
    text = hardened(
        path.read_text(encoding="utf-8"), path.parent, public_host=public_host, max_connections=max_connections
    )
    path.write_text(text, encoding="utf-8")


def hardened(configuration: str, answers: Path, *, public_host: str | None, max_connections: int | None) -> str:
    """The configuration with what an endpoint needs that several share a machine with, and strangers can reach.

    No backup: Ray's fallback proxy may be another instance's. HAProxy's own answers are JSON, 503 while no ingress is
    there. A request has to come in time, its body too, before an ingress hears of it. Pages of figures are on loopback
    (the endpoint's own address names its host). `/-/routes` is not answered, which would name the models without a key.
    answers: directory that holds `answer(status)` as STATUS.http
    public_host: where the endpoint listens in the place of the host that Ray knows; None for that
    max_connections: open at a time, at most; None for what the configuration says
    """
    ready = re.search(r"(?m)^backend http-", configuration) is not None
    for unwanted in (
        r"server .* backup",
        r"errorfile .*",
        r"http-request return .* if routes",
        r"timeout http-request .*",
    ):
        configuration = re.sub(rf"(?m)^[ \t]*{unwanted}$\n?", "", configuration)
    configuration = re.sub(r"(?m)^(\s*bind )\*?:", r"\g<1>127.0.0.1:", configuration)
    configuration = configuration.replace("\ndefaults\n", f"\ndefaults\n{_defaults(answers)}\n", 1)
    if max_connections is not None:
        configuration = re.sub(r"(?m)^(\s*maxconn ).*$", rf"\g<1>{max_connections}", configuration)
    if public_host is not None:
        configuration = re.sub(
            r"(?m)^(frontend http_frontend\n\s*bind ).*:(\d+)$", rf"\g<1>{public_host}:\g<2>", configuration
        )
    return _DEFAULT_ANSWER.sub(_unknown_path(404 if ready else 503), configuration)


def answer(status: int) -> bytes:
    """HAProxy's own answer, as it goes over the wire."""
    content = body(status).encode()
    retry = f"Retry-After: {RETRY_AFTER}\r\n" if status == 503 else ""
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n{retry}"
    return f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content


def body(status: int) -> str:
    message, kind, code = ANSWERS[status]
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})


def _defaults(answers: Path) -> str:
    files = {400: 400, 408: 408} | dict.fromkeys((500, 502, 503, 504), 503)
    lines = [f"timeout http-request {REQUEST_SECONDS}s", "option http-buffer-request"]
    lines += [f"errorfile {status} {answers}/{written}.http" for status, written in files.items()]
    return "\n".join(f"    {line}" for line in lines)


def _unknown_path(status: int) -> str:
    retry = f" hdr Retry-After {RETRY_AFTER}" if status == 503 else ""
    return f"    http-request return status {status} content-type application/json{retry} string '{body(status)}'"
