"""What the engine refuses before it begins: requests that it could not serve as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from mpo_ray.decoding.need import Need, need_of
from mpo_ray.decoding.protocol import GenerationRequest, RequestError, Sampling


class Room(Protocol):
    """What a runner has room for, as `Runner` says; that can be known before a model is opened."""

    vocab_size: int
    context: int

    def refusal(self, need: Need) -> str | None: ...


def check_request(request: GenerationRequest, weights: Mapping[str, float], runner: Room, names: Sequence[str]) -> None:
    """Raises RequestError, with the field that is to blame.

    weights: λ that the request is decoded with, by policy; any finite numbers, one of them at least not 0
    names: of the policies
    """
    prompt, sampling, mode = request.prompt_ids, request.sampling, request.mode
    if not prompt:
        raise RequestError("the prompt has no tokens.", "prompt")
    check_tokens(prompt, runner.vocab_size, param="prompt")
    if len(prompt) + max(sampling.max_tokens, 1) > runner.context:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens and the completion up to {sampling.max_tokens}; the context is "
            f"{runner.context} tokens. Shorten the prompt or lower max_tokens.",
            "prompt",
        )
    _check_sampling(sampling, runner.vocab_size)
    unknown = sorted(set(weights) - set(names))
    if unknown:
        raise RequestError(f"there is no objective {unknown[0]!r}; there are {', '.join(names)}.", "weights")
    if not all(map(math.isfinite, weights.values())) or not any(weights.values()):
        raise RequestError(f"weights {dict(weights)}: they are finite, and one of them is not 0.", "weights")
    if mode.particles < 1 or mode.max_attempts < 1:
        raise RequestError(f"particles {mode.particles}, max_attempts {mode.max_attempts}: both are 1 or more.", "mode")
    if mode.kind == "token":
        if mode.particles != 1:
            raise RequestError(f"particles {mode.particles}: token mode has 1.", "particles")
    else:
        _check_exact(request, weights)
    policies = [k for k, name in enumerate(names) if weights.get(name, 0.0) != 0]
    if (refusal := runner.refusal(need_of(request, policies))) is not None:
        raise RequestError(refusal, "particles" if mode.particles > 1 else "prompt")


def check_tokens(tokens: Sequence[int], vocab_size: int, *, param: str) -> None:
    """Raises RequestError for token ids that the model does not have."""
    unknown = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if unknown is not None:
        raise RequestError(f"the token id {unknown} is not in the vocabulary of {vocab_size} tokens.", param)


def check_ends(sampling: Sampling, end_ids: Sequence[int], vocab_size: int) -> None:
    """Raises RequestError where `min_tokens` forbids every token. end_ids: all that end a completion."""
    if sampling.min_tokens > 0 and len({*end_ids}) >= vocab_size:
        raise RequestError("every token ends the completion, which min_tokens forbids at first.", "stop_ids")


def _check_sampling(sampling: Sampling, vocab_size: int) -> None:
    ranges = {
        "max_tokens": (sampling.max_tokens >= 0, "0 or more"),
        "temperature": (0.0 <= sampling.temperature < math.inf, "0 or more"),
        "top_p": (0.0 < sampling.top_p <= 1.0, "above 0 and at most 1"),
        "top_k": (sampling.top_k >= 0, "0 (all tokens) or more"),
        "min_p": (0.0 <= sampling.min_p <= 1.0, "between 0 and 1"),
        "repetition_penalty": (0.0 < sampling.repetition_penalty < math.inf, "above 0"),
        "presence_penalty": (math.isfinite(sampling.presence_penalty), "a finite number"),
        "frequency_penalty": (math.isfinite(sampling.frequency_penalty), "a finite number"),
        "min_tokens": (0 <= sampling.min_tokens <= sampling.max_tokens, "between 0 and max_tokens"),
        "num_logprobs": ((sampling.num_logprobs or 0) >= 0, "0 or more"),
    }
    for name, (holds, wanted) in ranges.items():
        if not holds:
            raise RequestError(f"{name} is {getattr(sampling, name)}; it is {wanted}.", name)
    if "" in sampling.stop:
        raise RequestError("an empty stop string would end every completion at once; leave it out.", "stop")
    check_tokens(list(sampling.logit_bias), vocab_size, param="logit_bias")
    check_tokens(sampling.stop_ids, vocab_size, param="stop_token_ids")
    if not all(map(math.isfinite, sampling.logit_bias.values())):
        raise RequestError("every bias is a finite number.", "logit_bias")
    if len(sampling.logit_bias) == vocab_size and max(sampling.logit_bias.values()) <= -100:
        raise RequestError("every token is banned; leave one.", "logit_bias")


def _check_exact(request: GenerationRequest, weights: Mapping[str, float]) -> None:
    """What has no meaning for whole sequences is refused, not ignored (design 2.3)."""
    sampling, mode = request.sampling, request.mode
    neutral = Sampling(max_tokens=1)
    tokenwise = (
        "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
        "min_tokens", "ignore_eos",
    )  # fmt: skip
    for name in tokenwise:
        if getattr(sampling, name) != getattr(neutral, name):
            raise RequestError(
                f"{name} acts on single tokens and has no meaning for the sequence-level mixture; leave it out, or use "
                "token mode.",
                name,
            )
    if sampling.temperature <= 0.0:
        raise RequestError(
            "temperature 0 asks for the likeliest tokens, and an exact mode draws whole sequences; use a temperature "
            "above 0, or token mode.",
            "temperature",
        )
    if sampling.max_tokens < 1:
        raise RequestError("an exact mode draws at least one token; max_tokens is 0.", "max_tokens")
    if mode.kind == "rejection":
        total = sum(weights.values()) / sampling.temperature
        if min(weights.values()) < 0 or total < 1 - 1e-9:
            raise RequestError(
                f"rejection needs weights that are not negative and, divided by the temperature, sum to 1 or more "
                f"(they sum to {total:.3g}); use sequential Monte Carlo.",
                "temperature",
            )
