"""The page for people at `/`: its files, and the headers that let it load and call nothing but this endpoint."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
#: Where each file is found. They hold no secret: whoever may ask the endpoint has to say so in what the page calls.
PAGE_PATHS = {
    "/": "index.html",
    **{f"/page/{name}": name for name in ("page.css", "page.js", "endpoint.js", "icon.svg")},
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    directory = files("mpo_ray.serving").joinpath("page")
    for path, name in PAGE_PATHS.items():
        kind = KINDS[name.rpartition(".")[2]]
        router.add_api_route(path, _sender(directory.joinpath(name).read_bytes(), kind), methods=["GET"])
    return router


def _sender(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return send
