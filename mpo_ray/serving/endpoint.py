"""The HTTP side of the endpoint: its routes. What decodes is handed in.

It knows FastAPI and the tokenizer, and neither Ray nor the model, so that it is tested without either.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.requests import Request
from fastapi.responses import Response

from mpo_ray.decoding.protocol import EngineError
from mpo_ray.serving.answer_types import ChatAnswer, CompletionAnswer, Health, Model, ModelList, Version
from mpo_ray.serving.completing import Completing
from mpo_ray.serving.errors import ApiError, handle_errors
from mpo_ray.serving.gate import OPEN, Gate
from mpo_ray.serving.model_ids import model_ids, parse_model_id
from mpo_ray.serving.observer import Observer, Unobserved
from mpo_ray.serving.openai_schema import ChatRequest, CompletionRequest
from mpo_ray.serving.openapi_document import document, errors, streamed
from mpo_ray.serving.page_files import page_routes
from mpo_ray.serving.prompt_tokens import PromptTokens
from mpo_ray.serving.served import Served
from mpo_ray.serving.side_by_side import Generate
from mpo_ray.serving.token_routes import token_routes

#: The routes that take a body.
POSTS = frozenset({"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"})
METRICS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
COMPLETION_ERRORS = errors(400, 401, 404, 408, 413, 415, 422, 429, 503)


def create_app(
    served: Served,
    tokenizer: Any,
    generate: Generate,
    *,
    observer: Observer | None = None,
    metrics: Callable[[], tuple[bytes, str]] | None = None,
    check_health: Callable[[], Awaitable[None]] | None = None,
) -> FastAPI:
    """The endpoint as an ASGI application.

    generate: makes completions; leaving its iterator cancels them
    observer: hears of every completion; metrics: the body of /metrics and its content type, None for no such route
    check_health: raises EngineError for a 503 of /health
    """
    app = FastAPI(
        title="mpo_ray",
        version=version("mpo_ray"),
        docs_url=None,  # a page that loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    handle_errors(app)
    prompts = PromptTokens(tokenizer, served.longest_prompt, served.context)
    observer = observer or Unobserved()
    completing = Completing(served, tokenizer, generate, prompts, observer)
    app.include_router(token_routes(served, tokenizer, prompts))
    app.include_router(page_routes())
    started = int(time.time())

    @app.get("/v1/models", responses=errors(401, 429))
    async def models() -> ModelList:
        return {
            "object": "list",
            "data": [_model(one, started, prompts.has_chat_template) for one in model_ids(served)],
        }

    @app.get("/v1/models/{model:path}", responses=errors(400, 401, 404, 429))
    async def model(model: str) -> Model:
        parse_model_id(model, served)
        return _model(model, started, prompts.has_chat_template)

    @app.post("/v1/completions", responses=streamed(CompletionAnswer) | COMPLETION_ERRORS)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await completing.completion(request, body)

    @app.post("/v1/chat/completions", responses=streamed(ChatAnswer) | COMPLETION_ERRORS)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await completing.chat(request, body)

    @app.get("/health", responses=errors(503))
    async def health() -> Health:
        if check_health is not None:
            try:
                await check_health()
            except EngineError as error:
                raise ApiError(503, f"not healthy: {error}", code="unhealthy") from None
        return {"status": "ok"}

    @app.get("/version", responses=errors(401, 429))
    async def show_version() -> Version:
        return {"version": version("mpo_ray")}

    if metrics is not None:

        @app.get("/metrics", response_class=Response, responses=METRICS | errors(401, 429))
        async def show_metrics() -> Response:
            content, kind = metrics()
            return Response(content, media_type=kind)

    document(app, open_routes=sorted(OPEN))
    app.add_middleware(Gate, served=served, observer=observer, posts=POSTS)
    if served.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(served.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


def _model(model: str, created: int, has_chat_template: bool) -> Model:
    return {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "mpo_ray",
        "has_chat_template": has_chat_template,
    }
