"""What the endpoint accepts and answers: OpenAI's completions and chat completions, with `mixture` as our extension.

Every field is either honoured or refused by name. Fields of OpenAI's that are not implemented may be present with the
value that means nothing (null, or their default).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

#: OpenAI's fields that are not implemented, with the values that ask for nothing.
NOT_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "logprobs": (None, False),
    "top_logprobs": (None,),
    "echo": (None, False),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "parallel_tool_calls": (None,),
    "functions": (None,),
    "function_call": (None,),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "service_tier": (None, "auto"),
    "store": (None, False),
    "metadata": (None,),
}


class ApiError(Exception):
    """An answer other than success, in OpenAI's form. `param` names the field that is to blame."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, param, code)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Request(BaseModel):
    """A part of a request. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Mixture(Request):
    """Our extension: λ by objective (those left out have weight 0) and which mixture is decoded."""

    weights: dict[str, float] | None = None
    mode: Literal["token"] = "token"

    @field_validator("mode", mode="before")
    @classmethod
    def _only_token(cls, mode: object) -> object:
        if mode == "exact":
            raise ValueError(
                "this endpoint decodes the token-level mixture only; mode 'exact' (the sequence-level mixture) is not "
                "available yet. Use 'token'."
            )
        return mode


class StreamOptions(Request):
    include_usage: bool = False


class Sampling(Request):
    """What both kinds of completion share."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    n: Annotated[int, Field(ge=1, le=32)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="the caller's own name for its user; it changes nothing")
    mixture: Mixture = Mixture()

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for key, value in values.items():
            if key not in cls.model_fields and key in NOT_IMPLEMENTED:
                if value in NOT_IMPLEMENTED[key]:
                    continue
                raise ValueError(f"{key} is not implemented by this endpoint; leave it out (got {json.dumps(value)})")
            if value is not None:  # null means the default
                kept[key] = value
        return kept

    @model_validator(mode="after")
    def _options_go_with_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        if "" in self.stops:
            raise ValueError("stop: an empty string would end every completion at once; leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Sampling):
    """POST /v1/completions. A prompt is a text or token ids, or there is a list of either."""

    prompt: str | TokenIds | Annotated[list[str], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if is_one else list(prompt)


class TextPart(Request):
    type: Literal["text"]
    text: str


class ChatMessage(Request):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_completion_tokens or max_tokens, not both")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


class Answer:
    """The bodies of one request's answer, whole or in chunks. `chat` says which of the two kinds it is."""

    def __init__(self, *, chat: bool, id: str, created: int, model: str) -> None:
        self._chat = chat
        self._head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{id}", "created": created, "model": model}

    def whole(self, texts: list[tuple[str, str]], usage: dict[str, int]) -> dict[str, Any]:
        """texts: text and finish reason of every choice, in order."""
        choices = [
            {"index": i, "finish_reason": finish, "logprobs": None}
            | ({"message": {"role": "assistant", "content": text}} if self._chat else {"text": text})
            for i, (text, finish) in enumerate(texts)
        ]
        kind = "chat.completion" if self._chat else "text_completion"
        return self._head | {"object": kind, "choices": choices, "usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that says who speaks, in a chat."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) if self._chat else None

    def piece(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return self._chunk(index, {"content": text} if text else {}, finish_reason, text)

    def ending(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk without choices that ends a stream for which usage was asked."""
        return self._stream_head() | {"choices": [], "usage": usage}

    def _chunk(self, index: int, delta: dict[str, str], finish: str | None, text: str = "") -> dict[str, Any]:
        choice = {"index": index, "finish_reason": finish, "logprobs": None}
        return self._stream_head() | {"choices": [choice | ({"delta": delta} if self._chat else {"text": text})]}

    def _stream_head(self) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk" if self._chat else "text_completion"}


def usage_body(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
