"""What the endpoint accepts: OpenAI's completions and chat completions with vLLM's fields, and `mixture` as our own.

Every field is either honoured or refused by name. Fields of OpenAI's that are not implemented may be present with the
value that means nothing (null, or their default).
"""

from __future__ import annotations

import json
from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mpo_ray.decoding.protocol import ExactMethod

#: OpenAI's and vLLM's fields that are not implemented, with the values that ask for nothing.
NOT_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "best_of": (None, 1),
    "suffix": (None, ""),
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
    "web_search_options": (None,),
    "service_tier": (None, "auto"),
    "store": (None, False),
    "metadata": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "use_beam_search": (None, False),
    "prompt_logprobs": (None,),
    "structured_outputs": (None,),
    "bad_words": (None, []),
    "truncate_prompt_tokens": (None,),
}
#: Below this a temperature is neither greedy (0) nor anything that float32 can divide by.
LOWEST_TEMPERATURE = 0.001

StopString = Annotated[str, Field(min_length=1, max_length=256)]


def _document(schema: dict[str, Any], kind: type[BaseModel]) -> None:
    """Say in the JSON schema what `_neutral` does: null is the default, and some fields may only ask for nothing."""
    assert issubclass(kind, Request)
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            kept = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = kept | {"anyOf": [field, {"type": "null"}]}
    for name, values in kind.not_implemented.items():
        schema["properties"].setdefault(name, {"enum": list(values), "description": "not implemented"})


class Request(BaseModel):
    """A part of a request. Unknown fields are refused, and values of another type than JSON's own are not converted."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, json_schema_extra=_document)
    not_implemented: ClassVar[dict[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for key, value in values.items():
            if key not in cls.model_fields and key in cls.not_implemented:
                if any(value == neutral and type(value) is type(neutral) for neutral in cls.not_implemented[key]):
                    continue
                raise ValueError(
                    f"{key} is not implemented by this endpoint; leave it out (got {json.dumps(value)[:100]})"
                )
            if value is not None or key not in cls.model_fields:  # null means the default of a field that is known
                kept[key] = value
        return kept


class Mixture(Request):
    """Our extension: λ by objective (those left out have weight 0) and which mixture is decoded (design 2.3)."""

    weights: dict[str, float] | None = None
    mode: Literal["token", "exact"] = "token"
    method: ExactMethod | None = Field(None, description="of mode exact; smc, where the engine has it, if absent")
    particles: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="of mode exact: particles (smc) or attempts side by side (rejection)"
    )
    max_attempts: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None, description="of method rejection, which then gives up with status 422"
    )
    log_z: bool = Field(True, description="measure Σ log Z_t; mode exact always does")
    policy_logprobs: bool = Field(False, description="with logprobs: also log Z_t and each policy's own")

    @model_validator(mode="after")
    def _fields_of_the_mode(self) -> Mixture:
        if self.mode == "token":
            for name in ("method", "particles", "max_attempts"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} belongs to mode 'exact'; leave it out, or set the mode")
        elif not self.log_z:
            raise ValueError("mode 'exact' needs log Z_t; leave log_z out")
        if self.max_attempts is not None and self.method != "rejection":
            raise ValueError("max_attempts belongs to method 'rejection'; leave it out, or set the method")
        return self


class StreamOptions(Request):
    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="usage so far in every chunk; with include_usage")

    @model_validator(mode="after")
    def _usage_is_wanted(self) -> StreamOptions:
        if self.continuous_usage_stats and not self.include_usage:
            raise ValueError("continuous_usage_stats needs include_usage: true")
        return self


class Sampling(Request):
    """What both kinds of completion share."""

    not_implemented = NOT_IMPLEMENTED
    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = Field(0, description="0 and -1 keep every token")
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10.0)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]], Field(max_length=1024)] = {}
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=16)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True, max_length=64)] = []
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="the caller's own name for its user; it changes nothing")
    mixture: Mixture = Mixture()

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        if 0.0 < self.temperature < LOWEST_TEMPERATURE:
            raise ValueError(f"temperature is 0 (greedy), or from {LOWEST_TEMPERATURE} to 2")
        if self.mixture.policy_logprobs and self.num_logprobs is None:
            raise ValueError("mixture.policy_logprobs adds to logprobs; ask for them too")
        for key in self.logit_bias:
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError(f"logit_bias: {key[:100]!r} is not a token id")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to name at each place; None for no log-probabilities."""

    @property
    def echoes(self) -> bool:
        return False

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True, min_length=1)]
Texts = Annotated[list[str], Field(fail_fast=True, min_length=1)]


class CompletionRequest(Sampling):
    """POST /v1/completions. A prompt is a text or token ids, or there is a list of either."""

    prompt: str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False

    @model_validator(mode="after")
    def _some_tokens(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 asks for nothing, unless with echo: true")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if is_one else list(prompt)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def echoes(self) -> bool:
        return self.echo


class TextPart(Request):
    type: Literal["text"]
    text: str


class ChatMessage(Request):
    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Messages = Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _chat_fields_fit_each_other(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_completion_tokens or max_tokens, not both")
        if self.max_tokens == 0:
            raise ValueError("max_tokens 0 asks for nothing")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs: true")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(Request):
    """POST /tokenize: what a prompt, or messages in the chat template, become."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = Field(True, description="of a prompt; a chat template writes its own")
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of both")
        if self.messages is not None and not self.add_special_tokens:
            raise ValueError("add_special_tokens belongs to prompt; a chat template writes its own")
        return self


class DetokenizeRequest(Request):
    """POST /detokenize: the text of token ids, special tokens by their names."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
