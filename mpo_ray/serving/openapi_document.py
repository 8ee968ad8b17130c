"""The endpoint's OpenAPI document: which statuses each route answers with, and what is in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI

from mpo_ray.serving.answer_types import ErrorBody

MEANINGS = {
    400: "The request is wrong; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The answer took longer than the endpoint allows.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    422: "Rejection sampling used up its attempts.",
    429: "Too many requests wait, or this key made too many; `Retry-After` says when to come again.",
    503: "The engine could not go on; `Retry-After` says when to come again.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these statuses."""
    return {status: {"model": ErrorBody, "description": MEANINGS[status]} for status in statuses}


def streamed(answer: Any) -> dict[int | str, dict[str, Any]]:
    """A 200 that is `answer`, or events where `stream` was asked for; the schema is that of each event."""
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    return {200: {"model": answer, "content": {"text/event-stream": {"schema": event}}}}


def document(app: FastAPI, *, open_routes: Sequence[str]) -> None:
    """Let the document ask for the key on every route but the open ones, and forget FastAPI's own form of errors."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = made()
            components = schema.setdefault("components", {})
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    _forget_validation_errors(operation["responses"])
                    if path not in open_routes:
                        operation["security"] = [{"key": []}]
            for name in ("HTTPValidationError", "ValidationError"):
                components.get("schemas", {}).pop(name, None)
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]


def _forget_validation_errors(responses: dict[str, Mapping[str, Any]]) -> None:
    """FastAPI documents a 422 for wrong bodies, which are answered with 400 here."""
    content = responses.get("422", {}).get("content", {})
    if "HTTPValidationError" in str(content):
        del responses["422"]
