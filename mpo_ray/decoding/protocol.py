"""What an endpoint asks of whatever decodes, and what it gets back: the one contract between the two.

Token ids, sampling, weights and mode go in; tokens come out one after the other, with what was measured on the way.
Our own engine stands behind it, and another (vLLM) can. It knows neither HTTP nor models.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]
#: Ways to draw from the sequence-level mixture.
ExactMethod = Literal["smc", "rejection"]


class RequestError(ValueError):
    """A request that the engine cannot serve as it is. `param` names the field that is to blame."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message, param)
        self.message, self.param = message, param

    def __str__(self) -> str:
        return self.message


class QueueFullError(RuntimeError):
    """As many requests wait as the engine lets wait; try again later."""


class NothingAcceptedError(RuntimeError):
    """Rejection sampling used up its attempts: Z is too small for it. The message says what was seen."""


class EngineError(RuntimeError):
    """The engine could not go on with one request, or at all; its log has the cause."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn from the next-token distribution, and when a completion ends.

    temperature: of q_t in token mode, 0.0 is greedy; of whole sequences (λ/τ) in the exact modes
    top_k: 0 keeps every token; top_p, min_p: 1.0 and 0.0 do
    repetition_penalty: of tokens in prompt and completion; presence_penalty, frequency_penalty: in the completion
    stop: strings, cut from the text; stop_ids: token ids that end a completion as the end token does
    ignore_eos: go on after the end token; min_tokens: no end and no stop before as many tokens
    seed: None draws one; the same seed gives the same completion alone and in a crowd
    num_logprobs: how many of the likeliest tokens to name at each place, 0 for the drawn one alone, None for none
    policy_logprobs: also the drawn token's log-probability under each policy that takes part
    prompt_logprobs: log-probabilities of the prompt's tokens too (`num_logprobs` of them at each place)
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    seed: int | None = None
    num_logprobs: int | None = None
    policy_logprobs: bool = False
    prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Mode:
    """Which mixture is decoded (design 2.3): `token` is q, the others are the sequence-level π_λ.

    particles: of sequential Monte Carlo (`smc`), or attempts side by side (`rejection`); 1 in token mode
    max_attempts: after which rejection gives up
    log_z: whether Σ_t log Z_t is measured in token mode, which takes every policy's row through the output head
    """

    kind: Literal["token"] | ExactMethod = "token"
    particles: int = 1
    max_attempts: int = 1000
    log_z: bool = True


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One completion to make. `weights`: λ by objective, those left out 0; None for the engine's own.

    An engine that has the base of its adapters decodes it for `{"reference": 1.0}`, which is on no simplex.
    `id` is the caller's, unique among those in flight.
    continues_text: the completion's text is what decode(prompt + completion) has behind the prompt's; otherwise it is
        decode(completion), as of a chat's reply
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    mode: Mode = Mode()
    weights: Mapping[str, float] | None = None
    continues_text: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the token-level mixture before temperature and penalties, nats.

    top: the likeliest tokens at this place with theirs, descending
    by_policy: the token's log-probability under each policy that takes part; log_z: log Z_t. None where not asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    by_policy: Mapping[str, float] | None = None
    log_z: float | None = None


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """What was measured of a finished completion; None where its mode does not give it (design 2.3).

    log_z: Σ_t log Z_t of the tokens returned, nats: what decoding token by token drops
    log_z_hat: log Ẑ, the mode's estimate of the log-partition, nats
    effective_sample_size: of the particles, at the end
    particles: of sequential Monte Carlo; attempts: of rejection, up to the one that was accepted
    weights: λ that was decoded
    """

    mode: str
    weights: Mapping[str, float]
    log_z: float | None = None
    log_z_hat: float | None = None
    effective_sample_size: float | None = None
    particles: int | None = None
    attempts: int | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What a step added to a completion: tokens, the text that is now certain (perhaps none), their log-probabilities.

    `prompt_logprobs` come once, before or with the first token; the first place of a prompt has None.
    `finish_reason` and `diagnostics` are set on the last one; `stop` is the string or token id that ended it, None for
    the end token.
    """

    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    diagnostics: Diagnostics | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """A moment of an engine. Counts marked (total) only grow.

    kv_blocks, kv_blocks_used: of the KV cache, and of it those that requests hold
    admitted (total), queue_seconds (total): requests that got their blocks, and how long they all waited for them
    prompt_tokens (total), cached_prompt_tokens (total): that were computed, and that were in the KV cache already
    """

    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_used: int
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    admitted: int = 0
    queue_seconds: float = 0.0
    cached_prompt_tokens: int = 0


def every_token() -> float:
    """Tokens are told as they come, one in a delta."""
    return 1.0


class Engine(Protocol):
    """Decodes completions side by side."""

    objectives: tuple[str, ...]

    def generate(
        self, request: GenerationRequest, tokens_per_delta: Callable[[], float] = every_token
    ) -> AsyncIterator[Delta]:
        """Yield what is added; leaving the iterator aborts the request.

        tokens_per_delta: how many tokens a delta holds at least, asked after each, perhaps in another thread (`Pace`)
        Raises RequestError, QueueFullError before the first delta; NothingAcceptedError, EngineError.
        """

    async def abort(self, request_id: str) -> None:
        """End a request and free what it holds within one step; its iterator ends. An unknown id is no error."""

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the engine's own λ for requests that come from now on. Raises ValueError off the simplex."""

    def check_health(self) -> None:
        """Raise EngineError if it has ended or is stuck."""

    def statistics(self) -> Statistics:
        """Where it stands now."""
