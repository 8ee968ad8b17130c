"""Answers other than success, in OpenAI's form, and which error of the engine becomes which.

Nothing here tells a client the text of an error that was not made for clients: that is for the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from mpo_ray.decoding.protocol import EngineError, NothingAcceptedError, QueueFullError, RequestError

#: Characters of a message, at most: a client's own words are quoted, but not at length.
LONGEST_MESSAGE = 1000
#: OpenAI's `type` of an error, by status; the other 4xx are `invalid_request_error`.
TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
#: Seconds after which to come again, where the error itself does not know.
RETRY_AFTER = {429: 1, 503: 5}
#: The engine's names of fields, where a request has others.
FIELDS = {
    "num_logprobs": "logprobs",
    "stop_ids": "stop_token_ids",
    "weights": "mixture.weights",
    "particles": "mixture.particles",
    "mode": "mixture.mode",
    "method": "mixture.method",
    "policy_logprobs": "mixture.policy_logprobs",
}


#: Where a request's scope keeps why it was refused: the error's code, or its status.
REFUSAL = "mpo_ray.refusal"


class ApiError(Exception):
    """An answer other than success. `param` names the field that is to blame; `retry_after` is in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(status, message, param, code, retry_after)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = RETRY_AFTER.get(status) if retry_after is None else retry_after

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": _sendable(self.message),
                "type": TYPES.get(self.status, "invalid_request_error"),
                "param": None if self.param is None else _sendable(self.param),
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return headers if self.retry_after is None else headers | {"Retry-After": str(self.retry_after)}


def api_error_of(error: Exception) -> ApiError | None:
    """The answer to what the engine raised; None for what nobody foresaw."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, error.message, FIELDS.get(error.param, error.param))
    if isinstance(error, QueueFullError):
        return ApiError(429, "too many requests are waiting; try again later.", code="overloaded")
    if isinstance(error, NothingAcceptedError):
        # the message alone: an error that comes from another process may write itself with its traceback
        return ApiError(422, str(error.args[0]), "mixture.method", "nothing_accepted")
    if isinstance(error, EngineError):
        return ApiError(503, "the engine could not go on with this request; try again later.", code="engine_error")
    if isinstance(error, TimeoutError):
        return ApiError(
            408, "the answer took longer than this endpoint allows; ask for fewer tokens.", code="request_timeout"
        )
    return None


def context_exceeded(context: int | None, says: str, param: str) -> ApiError:
    """A prompt that is too long, in the words and with the code by which clients know to take another model.

    litellm looks for the first words, LangChain for the others, and both in the message alone.
    """
    words = f"this model's maximum context length is {context} tokens; the prompt is too long: {says}"
    return ApiError(400, words, param, "context_length_exceeded")


def unexpected(request_id: str) -> ApiError:
    return ApiError(500, f"an internal error; the server's log has it under the request id {request_id}.")


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


def handle_errors(app: FastAPI) -> None:
    """Answer in OpenAI's form wherever a route, or the lack of one, ends in an error."""

    def refuse(request: Request, error: ApiError) -> Response:
        request.scope[REFUSAL] = error.code or str(error.status)
        return error_response(error)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return refuse(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        problems = [_describe(problem) for problem in error.errors()]
        text = "; ".join(dict.fromkeys(f"{place}: {message}" if place else message for place, message in problems))
        return refuse(request, ApiError(400, text, problems[0][0] or None))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        answer = refuse(request, ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
        answer.headers.update(error.headers or {})
        return answer


def _describe(problem: Mapping[str, Any]) -> tuple[str, str]:
    """The field that a pydantic error is about, without the names of the types that were tried, and what is wrong."""
    if problem["type"] == "json_invalid":
        return "", f"the body is not JSON: {problem['ctx']['error']} at character {problem['loc'][-1]}"
    *parents, last = problem["loc"][1:] or ("",)
    place = [part for part in parents if _is_name(part)]
    if problem["type"] == "extra_forbidden" or _is_name(last):
        place.append(last)  # a client's own word may be any
    if problem["type"] in ("wrong", "role"):
        place.append(problem.get("ctx", {}).get("field", "role"))
    name = ".".join(map(str, place))
    if problem["type"] == "extra_forbidden":
        return name, "unknown field; it would have no effect, so leave it out"
    if place in ([], ["body"]) and problem["type"] in ("missing", "model_attributes_type"):
        return name, "the body is a JSON object"
    return name, str(problem["msg"])


def _is_name(part: int | str) -> bool:
    """Whether a part of an error's place is a field or an index, and not a type that was tried."""
    return isinstance(part, int) or (part.isidentifier() and part != "str")


def _sendable(text: str) -> str:
    """What UTF-8 can write of it, cut where it is long."""
    text = text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} …"
    return text.encode("utf-8", "replace").decode()
