"""What the endpoint accepts: OpenAI's completions and chat completions with vLLM's fields, and `mixture` as our own.

Every field is either honoured or refused by name (`neutral` has those that may only ask for nothing).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from mpo_ray.decoding.protocol import ExactMethod
from mpo_ray.serving.messages import Messages
from mpo_ray.serving.neutral import NOT_IMPLEMENTED, Values, without_nulls
from mpo_ray.serving.request_model import Request, wrong

#: Below this a temperature is neither greedy (0) nor anything that float32 can divide by.
LOWEST_TEMPERATURE = 0.001

WithoutNulls = BeforeValidator(without_nulls)
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]


class Mixture(Request):
    """Our extension: λ by objective (those left out have weight 0) and which mixture is decoded (design 2.3)."""

    weights: Annotated[dict[str, float], WithoutNulls] | None = None
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
                    raise wrong(name, f"{name} belongs to mode 'exact'; leave it out, or set the mode")
        elif not self.log_z:
            raise wrong("log_z", "mode 'exact' needs log Z_t; leave log_z out")
        if self.max_attempts is not None and self.method != "rejection":
            raise wrong("max_attempts", "max_attempts belongs to method 'rejection'; leave it out, or set the method")
        return self


class StreamOptions(Request):
    not_implemented: ClassVar[Mapping[str, Values]] = {"include_obfuscation": (False,)}
    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="usage so far in every chunk; with include_usage")

    @model_validator(mode="after")
    def _usage_is_wanted(self) -> StreamOptions:
        if self.continuous_usage_stats and not self.include_usage:
            raise wrong("continuous_usage_stats", "continuous_usage_stats needs include_usage: true")
        return self


class Sampling(Request):
    """What both kinds of completion share."""

    not_implemented: ClassVar[Mapping[str, Values]] = NOT_IMPLEMENTED
    #: Whether a completion's text goes on from the prompt's, and the field that the prompt comes from.
    continues_text: ClassVar[bool]
    prompt_field: ClassVar[str]
    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = Field(0, description="0 and -1 keep every token")
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10.0)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    logit_bias: Annotated[dict[str, Bias], WithoutNulls] = Field({}, max_length=1024)
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=16)] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field([], fail_fast=True, max_length=64)
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="the caller's own name for its user; it changes nothing")
    safety_identifier: str | None = Field(None, description="as `user`")
    prompt_cache_key: str | None = Field(None, description="as `user`; prefixes are kept without it")
    metadata: Annotated[dict[str, str], WithoutNulls] | None = Field(
        None, description="the caller's own labels; they change nothing"
    )
    mixture: Mixture = Mixture()

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> Sampling:
        if self.include_usage and not self.stream:
            raise wrong("stream_options", "stream_options is only allowed with stream: true")
        if 0.0 < self.temperature < LOWEST_TEMPERATURE:
            raise wrong("temperature", f"temperature is 0 (greedy), or from {LOWEST_TEMPERATURE} to 2")
        if self.mixture.policy_logprobs and self.num_logprobs is None:
            raise wrong("mixture.policy_logprobs", "mixture.policy_logprobs adds to logprobs; ask for them too")
        for key in self.logit_bias:
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise wrong("logit_bias", f"logit_bias: {key[:100]!r} is not a token id")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def limit_field(self) -> str:
        """The field that `max_new_tokens` comes from."""
        return "max_tokens"

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

    continues_text = True
    prompt_field = "prompt"
    prompt: str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1)] | None = Field(None, description="not implemented; n asks for nothing")

    @model_validator(mode="after")
    def _some_tokens(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise wrong("best_of", f"best_of is not implemented by this endpoint; leave it out (got {self.best_of})")
        if self.max_tokens == 0 and not self.echo:
            raise wrong("max_tokens", "max_tokens 0 asks for nothing, unless with echo: true")
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


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    continues_text = False
    prompt_field = "messages"
    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _chat_fields_fit_each_other(self) -> ChatRequest:
        if self.max_tokens == 0:
            raise wrong("max_tokens", "max_tokens 0 asks for nothing")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise wrong(
                "max_tokens",
                f"max_tokens {self.max_tokens} and max_completion_tokens {self.max_completion_tokens} are two names of "
                "one limit; give one of them",
            )
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", "top_logprobs is only allowed with logprobs: true")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def limit_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

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
            raise wrong("prompt", "give prompt or messages, one of both")
        if self.messages is not None and not self.add_special_tokens:
            raise wrong("add_special_tokens", "add_special_tokens belongs to prompt; a chat template writes its own")
        return self


class DetokenizeRequest(Request):
    """POST /detokenize: the text of token ids, special tokens by their names."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
