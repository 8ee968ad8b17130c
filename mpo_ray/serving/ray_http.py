"""The outermost layer of Ray Serve's HTTP servers: one request id, and Ray's own errors in the API's form.

RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names `middlewares`, which Ray calls in each of its proxies and ingresses.
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mpo_ray.serving.errors import ApiError, error_response
from mpo_ray.serving.gate import REQUEST_ID

#: Names the applications of the cluster, which nobody learns here without a key.
ROUTES = "/-/routes"
MESSAGES = {
    404: ("nothing is served at this path.", None),
    408: ("the answer took longer than this endpoint allows.", "request_timeout"),
    429: ("too many requests are open; try again later.", "overloaded"),
    503: ("the endpoint is not ready or has too many requests open; try again later.", "not_ready"),
}


def middlewares() -> list[Middleware]:
    return [Middleware(ApiForm)]


class ApiForm:
    """ASGI middleware around everything that Ray itself answers, Ray's own middlewares among it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/") == ROUTES:
            await error_response(_refusal(404))(scope, receive, send)
            return
        given = Headers(scope=scope).getlist("x-request-id")
        if given and not (len(given) == 1 and REQUEST_ID.fullmatch(given[0])):
            # Ray would send it back
            headers = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
            scope = {**scope, "headers": headers}
        replaced = False

        async def sending(message: Message) -> None:
            nonlocal replaced
            if message["type"] != "http.response.start":
                if not replaced:
                    await send(message)
                return
            headers = MutableHeaders(scope=message)
            if ids := headers.getlist("x-request-id"):
                headers["x-request-id"] = ids[0]  # the application's, where it gave one: then comes Ray's
            kind = headers.get("content-type", "")
            if message["status"] >= 400 and not kind.startswith("application/json"):
                replaced = True
                answer = error_response(_refusal(message["status"]))
                for name in ("x-request-id", "retry-after"):
                    if name in headers:
                        answer.headers[name] = headers[name]
                await answer(scope, receive, send)
                return
            await send(message)

        await self._app(scope, receive, sending)


def _refusal(status: int) -> ApiError:
    fallback = "the request was refused." if status < 500 else "an internal error of the server."
    text, code = MESSAGES.get(status, (fallback, None))
    return ApiError(status, text, code=code)
