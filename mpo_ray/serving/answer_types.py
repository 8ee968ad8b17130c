"""The shapes of what the endpoint answers, as its OpenAPI document shows them.

`mixture`, and `policy_logprobs` and `log_z` among log-probabilities, are ours; the rest is OpenAI's and vLLM's.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

FinishReason = Literal["stop", "length"]


@with_config(ConfigDict(extra="forbid"))
class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


@with_config(ConfigDict(extra="forbid"))
class ErrorBody(TypedDict):
    error: ErrorDetail


@with_config(ConfigDict(extra="forbid"))
class Model(TypedDict):
    """has_chat_template: whether /v1/chat/completions answers"""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    has_chat_template: bool


@with_config(ConfigDict(extra="forbid"))
class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


@with_config(ConfigDict(extra="forbid"))
class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@with_config(ConfigDict(extra="forbid"))
class MixtureReport(TypedDict):
    """What was measured of a completion (design 2.3); null where its mode does not give it. Log-values in nats.

    weights: λ that was decoded (over the temperature, in mode exact)
    """

    mode: Literal["token", "exact"]
    method: Literal["smc", "rejection"] | None
    weights: dict[str, float]
    log_z: float | None
    log_z_hat: float | None
    effective_sample_size: float | None
    particles: int | None
    attempts: int | None


@with_config(ConfigDict(extra="forbid"))
class CompletionLogprobs(TypedDict):
    """text_offset: place of each token in the choice's text, characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    policy_logprobs: NotRequired[list[dict[str, float] | None]]
    log_z: NotRequired[list[float | None]]


@with_config(ConfigDict(extra="forbid"))
class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


@with_config(ConfigDict(extra="forbid"))
class ChatTokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]
    policy_logprobs: NotRequired[dict[str, float] | None]
    log_z: NotRequired[float | None]


@with_config(ConfigDict(extra="forbid"))
class ChatLogprobs(TypedDict):
    content: list[ChatTokenLogprob]
    refusal: None


@with_config(ConfigDict(extra="forbid"))
class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    mixture: MixtureReport


@with_config(ConfigDict(extra="forbid"))
class CompletionAnswer(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


@with_config(ConfigDict(extra="forbid"))
class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


@with_config(ConfigDict(extra="forbid"))
class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    mixture: MixtureReport


@with_config(ConfigDict(extra="forbid"))
class ChatAnswer(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


@with_config(ConfigDict(extra="forbid"))
class TokenizeAnswer(TypedDict):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


@with_config(ConfigDict(extra="forbid"))
class DetokenizeAnswer(TypedDict):
    prompt: str


@with_config(ConfigDict(extra="forbid"))
class Health(TypedDict):
    status: Literal["ok"]


@with_config(ConfigDict(extra="forbid"))
class Version(TypedDict):
    version: str
