"""What every HTTP request passes first and last: its id, its key, its rate, its body, and a line in the log."""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mpo_ray.serving.body_check import check_content_type, check_depth, check_text, read_body
from mpo_ray.serving.errors import REFUSAL, ApiError, error_response, unexpected
from mpo_ray.serving.keys import Keys, RateLimit
from mpo_ray.serving.observer import Observer
from mpo_ray.serving.page_files import PAGE_PATHS
from mpo_ray.serving.served import Served

#: Routes that ask for no key: a load balancer has none, and the page asks the person for it.
OPEN = frozenset({"/health", *PAGE_PATHS})
#: Ids that a client may give its requests; others would be fit to forge lines of a log.
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

access_log = logging.getLogger("mpo_ray.access")
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Passage:
    """One request on its way through.

    tokens: that were made for it; status: None while there is no answer; admitted: whether the engine was asked
    """

    id: str
    tokens: int = 0
    status: int | None = None
    admitted: bool = False


def passage_of(scope: Any) -> Passage:
    """The passage of a request's scope (or of the request itself)."""
    found: Passage = scope["mpo_ray.passage"]
    return found


class Gate:
    """ASGI middleware. What it refuses, and what nobody foresaw, it answers itself. posts: paths that take a body.

    HEAD is answered wherever GET is, and a slash at the end of a path changes nothing.
    """

    def __init__(self, app: ASGIApp, served: Served, observer: Observer, posts: frozenset[str]) -> None:
        self._app, self._served, self._observer, self._posts = app, served, observer, posts
        self._keys, self._rate = Keys(served.key_digests), RateLimit(served.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, headers = time.monotonic(), Headers(scope=scope)
        given = headers.get("x-request-id", "")
        passage = Passage(given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        asked = scope["method"]
        # HEAD is GET whose body is not sent; a slash at the end of a path means nothing
        prefix = root if scope["path"].startswith(root := scope.get("root_path", "")) else ""
        path = prefix + (scope["path"].removeprefix(prefix).rstrip("/") or "/")
        scope = {**scope, "method": "GET" if asked == "HEAD" else asked, "path": path, "mpo_ray.passage": passage}

        async def sending(message: Message) -> None:
            if asked == "HEAD" and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            if message["type"] == "http.response.start":
                passage.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = passage.id
            await send(message)

        try:
            await self._pass(scope, headers, receive, sending)
        except ApiError as error:
            scope[REFUSAL] = error.code or str(error.status)
            await error_response(error)(scope, receive, sending)
        except Exception:
            logger.exception("request %s failed", passage.id)
            if passage.status is None:
                await error_response(unexpected(passage.id))(scope, receive, sending)
        finally:
            if REFUSAL in scope and not passage.admitted:
                self._observer.rejected(scope[REFUSAL], time.monotonic())
            access_log.info(
                "id=%s method=%s route=%s status=%s ms=%.1f tokens=%d",
                passage.id,
                asked if asked.isalpha() else "-",
                getattr(scope.get("route"), "path", "-"),
                passage.status or "-",
                1000 * (time.monotonic() - began),
                passage.tokens,
            )

    async def _pass(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # where it is served below a prefix
        if path not in OPEN:
            self._rate.take(self._keys.owner(headers.get("authorization")))
        if scope["method"] != "POST" or path not in self._posts:
            await self._app(scope, receive, send)
            return
        check_content_type(headers)
        body = await read_body(headers, receive, max_bytes=self._served.max_body)
        if body is None:
            return
        check_text(body)
        check_depth(body, max_depth=self._served.max_depth)
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)
