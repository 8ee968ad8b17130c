"""The HTTP side of the endpoint: routes, API key, model ids, errors and streams. What decodes is handed in.

It knows FastAPI and the tokenizer, and neither Ray nor the model, so that it is tested without either.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI, Header
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from mpo_ray.data.tokens import prompt_token_ids
from mpo_ray.decoding.protocol import GenerationRequest, RequestError
from mpo_ray.decoding.protocol import Sampling as Drawing
from mpo_ray.records import check_weights
from mpo_ray.serving.openai_schema import Answer, ApiError, ChatRequest, CompletionRequest, Sampling, usage_body
from mpo_ray.serving.side_by_side import Batch, Generate

MOST_CHOICES = 128


@dataclass(frozen=True, slots=True)
class Served:
    """What an endpoint serves. `key_digest`: SHA-256 of the API key, None where none is asked for."""

    name: str
    objectives: tuple[str, ...]
    context: int | None
    max_tokens: int
    key_digest: str | None


def parse_model_id(model: str, name: str, objectives: Sequence[str]) -> dict[str, float] | None:
    """The weights that a model id asks for: `name` none, `name/objective` a vertex, `name@helpful=0.7,harmless=0.3`.

    Raises ApiError: 404 for an unknown model, 400 for weights off the simplex.
    """
    if model == name:
        return None
    if model.startswith(f"{name}/") and (objective := model[len(name) + 1 :]) in objectives:
        return {one: float(one == objective) for one in objectives}
    if not model.startswith(f"{name}@"):
        ids = ", ".join([name, *(f"{name}/{objective}" for objective in objectives)])
        raise ApiError(404, f"the model {model!r} does not exist; there are {ids}.", "model", "model_not_found")
    weights: dict[str, float] = {}
    for part in model[len(name) + 1 :].split(","):
        objective, _, value = part.partition("=")
        try:
            weights[objective] = float(value)
        except ValueError:
            raise ApiError(
                400, f"model {model!r}: {part!r} is not objective=weight, as in {name}@{objectives[0]}=1.0.", "model"
            ) from None
    return _checked(weights, objectives, "model")


def _checked(weights: Mapping[str, float], objectives: Sequence[str], place: str) -> dict[str, float]:
    try:
        return check_weights(weights, objectives, where=place)
    except ValueError as error:
        raise ApiError(400, str(error), place) from None


def create_app(served: Served, tokenizer: Any, generate: Generate) -> FastAPI:
    """The endpoint as an ASGI application. `generate` makes completions; leaving its iterator cancels them."""
    app = FastAPI(title="mpo_ray", version=version("mpo_ray"))
    started = int(time.time())
    handlers = _Handlers(served, tokenizer, generate)

    def authorised(authorization: str | None = Header(None)) -> None:
        if served.key_digest is None:
            return
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.encode()).hexdigest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, served.key_digest):
            raise ApiError(
                401, "send the API key as `Authorization: Bearer KEY`; it is missing or wrong.", code="invalid_api_key"
            )

    protected = [Depends(authorised)]

    @app.get("/v1/models", dependencies=protected)
    async def models() -> dict[str, Any]:
        ids = [served.name, *(f"{served.name}/{objective}" for objective in served.objectives)]
        return {"object": "list", "data": [_model_body(one, started) for one in ids]}

    @app.get("/v1/models/{model:path}", dependencies=protected)
    async def model(model: str) -> dict[str, Any]:
        parse_model_id(model, served.name, served.objectives)
        return _model_body(model, started)

    @app.post("/v1/completions", dependencies=protected)
    async def completions(body: CompletionRequest) -> Response:
        prompts = [one if isinstance(one, list) else prompt_token_ids(tokenizer, one) for one in body.prompts]
        return await handlers.answer(body, prompts, chat=False)

    @app.post("/v1/chat/completions", dependencies=protected)
    async def chat_completions(body: ChatRequest) -> Response:
        messages = tuple({"role": message.role, "content": message.text} for message in body.messages)
        if not getattr(tokenizer, "chat_template", None):
            raise ApiError(400, "this model has no chat template; use /v1/completions.", "messages")
        try:
            prompt = prompt_token_ids(tokenizer, messages)
        except Exception as error:  # a template refuses messages with an error of its own choice
            raise ApiError(400, f"the chat template refuses these messages: {error}", "messages") from None
        return await handlers.answer(body, [prompt], chat=True)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/version")
    async def show_version() -> dict[str, str]:
        return {"version": version("mpo_ray")}

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return _error(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        problems = [_describe(problem) for problem in error.errors()]
        text = "; ".join(dict.fromkeys(f"{place}: {message}" if place else message for place, message in problems))
        return _error(ApiError(400, text, problems[0][0] or None))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return _error(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return _error(ApiError(500, f"{type(error).__name__} while answering; the server's log has the details."))

    return app


class _Handlers:
    """From a checked request to its answer."""

    def __init__(self, served: Served, tokenizer: Any, generate: Generate) -> None:
        self._served, self._tokenizer, self._generate = served, tokenizer, generate

    async def answer(self, body: Sampling, prompts: list[list[int]], *, chat: bool) -> Response:
        requests = self._requests(body, prompts)
        prompt_tokens = sum(map(len, prompts))
        answer = Answer(chat=chat, id=uuid.uuid4().hex, created=int(time.time()), model=body.model)
        batches = self._generate(requests)
        try:
            first = await anext(batches)  # a refusal comes before the first piece, while the status can still say so
        except RequestError as error:
            raise ApiError(400, error.message, error.param) from None
        if body.stream:
            stream = _stream(answer, first, batches, len(requests), prompt_tokens if body.include_usage else None)
            return StreamingResponse(stream, media_type="text/event-stream")
        texts, finish, num_tokens = [""] * len(requests), [""] * len(requests), 0
        async for batch in _chain(first, batches):
            for number, delta in batch:
                texts[number] += delta.text
                finish[number] = delta.finish_reason or ""
                num_tokens += len(delta.tokens)
        whole = answer.whole(list(zip(texts, finish, strict=True)), usage_body(prompt_tokens, num_tokens))
        return JSONResponse(whole)

    def _requests(self, body: Sampling, prompts: list[list[int]]) -> list[GenerationRequest]:
        """One per prompt and choice, the choices of a prompt beside each other."""
        served = self._served
        weights = parse_model_id(body.model, served.name, served.objectives)
        if body.mixture.weights is not None:
            if weights is not None:
                raise ApiError(
                    400, f"the model {body.model!r} and mixture.weights both give weights.", "mixture.weights"
                )
            weights = _checked(body.mixture.weights, served.objectives, "mixture.weights")
        if len(prompts) * body.n > MOST_CHOICES:
            raise ApiError(400, f"{len(prompts)} prompts × n = {body.n} is more than {MOST_CHOICES} choices.", "n")
        return [
            GenerationRequest(
                id=uuid.uuid4().hex,
                prompt_ids=tuple(prompt),
                sampling=Drawing(
                    max_tokens=self._limit(body, prompt),
                    temperature=body.temperature,
                    top_p=body.top_p,
                    seed=None if body.seed is None else (body.seed + len(prompts) * choice + row) % 2**63,
                    stop=body.stops,
                ),
                weights=weights,
            )
            for row, prompt in enumerate(prompts)
            for choice in range(body.n)
        ]

    def _limit(self, body: Sampling, prompt: list[int]) -> int:
        """max_new_tokens of a prompt: what was asked for, or what there is room for."""
        served, asked = self._served, body.max_new_tokens
        unknown = [token for token in prompt if token >= len(self._tokenizer)]
        if unknown:
            raise ApiError(400, f"the token id {unknown[0]} is not in the vocabulary.", "prompt")
        if asked is not None and asked > served.max_tokens:
            raise ApiError(
                400, f"max_tokens {asked} is above this endpoint's limit of {served.max_tokens}.", "max_tokens"
            )
        room = served.max_tokens if served.context is None else served.context - len(prompt)
        if room < (asked or 1):
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens and the completion at least {asked or 1}; the model's context is "
                f"{served.context} tokens. Shorten the prompt or lower max_tokens.",
                "prompt",
                "context_length_exceeded",
            )
        return asked or min(room, served.max_tokens)


async def _stream(
    answer: Answer, first: Batch, rest: AsyncGenerator[Batch], num_choices: int, prompt_tokens: int | None
) -> AsyncIterator[str]:
    """Server-sent events: a chunk per piece of text, usage if `prompt_tokens` is given, then `[DONE]`."""
    for index in range(num_choices):
        if (opening := answer.opening(index)) is not None:
            yield _event(opening)
    num_tokens = 0
    try:
        async with aclosing(rest):
            async for batch in _chain(first, rest):
                for number, delta in batch:
                    num_tokens += len(delta.tokens)
                    if delta.text or delta.finish_reason:
                        yield _event(answer.piece(number, delta.text, delta.finish_reason))
    except Exception as error:  # the status was sent long ago: the stream itself has to say it
        yield _event(ApiError(500, f"decoding failed: {type(error).__name__}").body())
        return
    if prompt_tokens is not None:
        yield _event(answer.ending(usage_body(prompt_tokens, num_tokens)))
    yield "data: [DONE]\n\n"


async def _chain(first: Batch, rest: AsyncIterator[Batch]) -> AsyncIterator[Batch]:
    yield first
    async for batch in rest:
        yield batch


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _model_body(model: str, created: int) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": created, "owned_by": "mpo_ray"}


def _describe(problem: Mapping[str, Any]) -> tuple[str, str]:
    """The field that a pydantic error is about, without the names of the types that were tried, and what is wrong."""
    place = [part for part in problem["loc"][1:] if isinstance(part, int) or (part.isidentifier() and part != "str")]
    if problem["type"] == "extra_forbidden":
        return ".".join(map(str, place)), "unknown field; it would have no effect, so leave it out"
    return ".".join(map(str, place)), str(problem["msg"]).removeprefix("Value error, ")


def _error(error: ApiError) -> Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(error.body(), status_code=error.status, headers=headers)
