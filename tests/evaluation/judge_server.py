"""A real HTTP server on loopback that answers like an OpenAI-compatible one, by a rule that a test can state."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

#: Question → answer. A dict is sent as it is, with its `status`, `headers` and `body`.
Rule = Callable[[str], "str | dict[str, Any]"]


def responses_of(question: str) -> tuple[str, str]:
    """The two responses that stand between the marks of the project's own template."""
    found = re.search(
        r"\[begin response A (\w+)\]\n(.*)\n\[end response A \1\]\n\n"
        r"\[begin response B \1\]\n(.*)\n\[end response B \1\]",
        question,
        re.DOTALL,
    )
    assert found is not None, question
    return found[2], found[3]


def prefers_shorter(question: str) -> str:
    a, b = responses_of(question)
    verdict = "tie" if len(a) == len(b) else "A" if len(a) < len(b) else "B"
    return f"{len(a)} characters against {len(b)}.\nVerdict: {verdict}"


def always_a(question: str) -> str:
    return "The first reads better.\nVerdict: A"


def failure(status: int, body: str = "", **headers: str) -> dict[str, Any]:
    return {"status": status, "headers": {k.replace("_", "-"): v for k, v in headers.items()}, "body": body}


@dataclass
class JudgeServer:
    """Serves `models`, answers by `rule`; `first` holds answers for the first requests instead. A context manager."""

    rule: Rule = prefers_shorter
    first: list[dict[str, Any]] = field(default_factory=list)
    models: list[str] = field(default_factory=lambda: ["judge-1"])
    usage: bool = True
    key: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    @property
    def num_requests(self) -> int:
        return len(self.bodies)

    @property
    def questions(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]

    def answer(self, body: dict[str, Any], authorization: str | None) -> dict[str, Any]:
        if self.key is not None and authorization != f"Bearer {self.key}":
            return failure(401, f"Incorrect API key provided: {authorization}")
        with self._lock:
            self.bodies.append(body)
            if self.first:
                return self.first.pop(0)
        if body["model"] not in self.models:
            return failure(404, json.dumps({"error": f"The model {body['model']} does not exist"}))
        question = body["messages"][0]["content"]
        text = self.rule(question)
        if isinstance(text, dict):
            return text
        usage = {"prompt_tokens": len(question) // 4, "completion_tokens": max(1, len(text) // 4)}
        values = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
        return {
            "status": 200,
            "headers": {},
            "body": json.dumps({**values, **({"usage": usage} if self.usage else {})}),
        }


def _handler(judge: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 60

        def do_GET(self) -> None:
            if self.path != "/v1/models":
                self._send(failure(404, "no such path"))
                return
            names = json.dumps({"object": "list", "data": [{"id": name} for name in judge.models]})
            refused = judge.key is not None and self.headers.get("Authorization") != f"Bearer {judge.key}"
            self._send(failure(401, "who are you?") if refused else {"status": 200, "headers": {}, "body": names})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                self._send(failure(404, "no such path"))
                return
            self._send(judge.answer(body, self.headers.get("Authorization")))

        def _send(self, answer: dict[str, Any]) -> None:
            content = answer["body"].encode()
            with contextlib.suppress(ConnectionError):  # of a client that waited no longer
                self.send_response(answer["status"])
                for name, value in answer["headers"].items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
