"""From a checked HTTP request to the completions that the engine is asked for, within the endpoint's limits."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence

from mpo_ray.decoding.protocol import GenerationRequest, Mode
from mpo_ray.decoding.protocol import Sampling as Drawing
from mpo_ray.serving.errors import ApiError, context_exceeded
from mpo_ray.serving.model_ids import checked_weights, parse_model_id
from mpo_ray.serving.openai_schema import Mixture, Sampling
from mpo_ray.serving.served import Served

#: Particles of mode `exact` where a request names no number, and attempts after which rejection gives up.
PARTICLES = 8
MAX_ATTEMPTS = 1000


def wanted_weights(body: Sampling, served: Served) -> dict[str, float] | None:
    """λ that the model id or the body asks for; None for the engine's own. Raises ApiError."""
    weights = parse_model_id(body.model, served)
    if body.mixture.weights is None:
        return weights
    if weights is not None:
        raise ApiError(400, f"the model {body.model[:100]!r} and mixture.weights both give weights.", "mixture.weights")
    return checked_weights(body.mixture.weights, served.objectives, "mixture.weights")


def check_size(body: Sampling, num_prompts: int, weights: Mapping[str, float] | None, served: Served) -> None:
    """Refuse what is too much before any prompt is tokenised. Raises ApiError."""
    if num_prompts > served.max_prompts:
        raise ApiError(400, f"{num_prompts} prompts are more than {served.max_prompts}.", "prompt")
    if body.n > served.max_n:
        raise ApiError(400, f"n = {body.n} is more than {served.max_n}.", "n")
    choices = num_prompts * body.n
    if choices > served.max_choices:
        raise ApiError(400, f"{num_prompts} prompts × n = {body.n} is more than {served.max_choices} choices.", "n")
    asked = body.max_new_tokens
    if asked is not None and asked > served.max_tokens:
        field = body.limit_field
        raise ApiError(400, f"{field} {asked} is above this endpoint's limit of {served.max_tokens}.", field)
    policies = len(served.objectives) if weights is None else sum(weight != 0 for weight in weights.values())
    particles = mode_of(body.mixture, served).particles
    tokens = served.max_tokens if asked is None else asked
    if (work := policies * particles * choices * tokens) > served.max_work:
        raise ApiError(
            400,
            f"{policies} policies × {particles} particles × {choices} choices × {tokens} tokens = {work} is more than "
            f"{served.max_work}; ask for fewer.",
            body.limit_field,
        )


def mode_of(mixture: Mixture, served: Served) -> Mode:
    if mixture.mode == "token":
        return Mode(log_z=mixture.log_z)
    method = mixture.method or served.exact_methods[0]
    if method not in served.exact_methods:
        raise ApiError(
            400,
            f"method {method!r}: the engine behind this endpoint draws exact samples by {served.exact_methods[0]!r} "
            "alone. The operator can serve the same mixture with engine: mpo.",
            "mixture.method",
        )
    return Mode(method, mixture.particles or PARTICLES, mixture.max_attempts or MAX_ATTEMPTS)


def plan(
    body: Sampling, prompts: Sequence[Sequence[int]], weights: Mapping[str, float] | None, served: Served
) -> list[GenerationRequest]:
    """One per prompt and choice, the choices of a prompt beside each other. Raises ApiError.

    Each has a seed of its own that follows from the request's, the first one the request's itself.
    """
    num_logprobs = body.num_logprobs
    return [
        GenerationRequest(
            id=uuid.uuid4().hex,
            prompt_ids=tuple(prompt),
            sampling=Drawing(
                max_tokens=_max_tokens(body, len(prompt), served),
                temperature=body.temperature,
                top_p=body.top_p,
                top_k=max(body.top_k, 0),
                min_p=body.min_p,
                repetition_penalty=body.repetition_penalty,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                logit_bias={int(token): bias for token, bias in body.logit_bias.items()},
                stop=body.stops,
                stop_ids=tuple(body.stop_token_ids),
                min_tokens=body.min_tokens,
                ignore_eos=body.ignore_eos,
                seed=None if body.seed is None else derived_seed(body.seed, row * body.n + choice),
                num_logprobs=num_logprobs,
                policy_logprobs=body.mixture.policy_logprobs,
                prompt_logprobs=body.echoes and num_logprobs is not None,
            ),
            mode=mode_of(body.mixture, served),
            weights=weights,
            continues_text=body.continues_text,
        )
        for row, prompt in enumerate(prompts)
        for choice in range(body.n)
    ]


def derived_seed(seed: int, number: int) -> int:
    """The seed of a request's choice. Not seed + number: another request's seed would draw the same completions."""
    if number == 0:
        return seed % 2**63
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "big") >> 1


def _max_tokens(body: Sampling, prompt_tokens: int, served: Served) -> int:
    """What was asked for, or what there is room for."""
    asked = body.max_new_tokens
    room = served.max_tokens if served.context is None else served.context - prompt_tokens
    needed = max(1, 1 if asked is None else asked)
    if room < needed:
        raise context_exceeded(
            served.context,
            f"it has {prompt_tokens} tokens, and the completion at least {needed}. Shorten the prompt or lower "
            f"{body.limit_field}.",
            body.prompt_field,
        )
    return min(room, served.max_tokens) if asked is None else asked
