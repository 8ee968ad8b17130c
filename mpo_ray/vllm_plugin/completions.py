"""Completions as the endpoint wants them, from what vLLM says of single tokens (design 2.3, 5.5).

vLLM draws the tokens. Where a completion ends, its text, log Z_t and the acceptance of rejection sampling are those of
our engine.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from mpo_ray.decoding.acceptance import Attempt, Attempts
from mpo_ray.decoding.drafts import Draft, Rules
from mpo_ray.decoding.protocol import (
    Delta,
    Diagnostics,
    EngineError,
    GenerationRequest,
    RequestError,
    TokenLogprob,
)
from mpo_ray.decoding.token_choice import History
from mpo_ray.vllm_plugin.log_z import NUM_COLUMNS, read_log_z
from mpo_ray.vllm_plugin.request_weights import WEIGHTS

#: What vLLM says of one place: by token, an object with its raw logit.
Table = Mapping[int, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """A running vLLM engine with log Z_t among its raw logits. cache_salt: keeps its cache apart from other models'."""

    llm: Any
    vocab_size: int
    cache_salt: str


@dataclass(frozen=True, slots=True)
class _Token:
    """One drawn token, or one of the prompt, with what was asked for; log Z_t is NaN where nothing was."""

    token: int
    logprob: TokenLogprob | None
    log_z: float
    prompt: tuple[TokenLogprob | None, ...] | None = None


def refuse(request: GenerationRequest) -> None:
    """Raises RequestError for what our own engine does and vLLM does not."""
    if request.mode.kind == "smc":
        raise RequestError(
            "sequential Monte Carlo moves caches between particles, which vLLM does not; ask for method "
            '"rejection", or serve with engine: mpo.',
            "method",
        )
    if request.sampling.policy_logprobs:
        raise RequestError(
            "with vLLM the policies' own log-probabilities are not known; leave policy_logprobs out, or serve with "
            "engine: mpo.",
            "policy_logprobs",
        )


def complete(
    source: Source, request: GenerationRequest, weights: Sequence[float], names: Sequence[str], rules: Rules
) -> AsyncGenerator[Delta]:
    """What is added to a completion, as it comes; leaving the generator ends it. weights: (K,) λ by `names`."""
    one = _one_by_one if request.mode.kind == "token" else _accepted
    return one(source, request, weights, names, rules)


async def _one_by_one(
    source: Source, request: GenerationRequest, weights: Sequence[float], names: Sequence[str], rules: Rules
) -> AsyncGenerator[Delta]:
    """Token mode."""
    sampling, mode = request.sampling, request.mode
    parameters = sampling_parameters(request, weights, rules, sampling.seed, measured=mode.log_z)
    draft = _draft(rules)
    async with aclosing(_tokens(source, request, request.id, parameters)) as tokens:
        async for drawn in tokens:
            if sampling.max_tokens == 0:  # vLLM draws one token at least
                diagnostics = _diagnostics(request, weights, names)
                yield Delta(prompt_logprobs=drawn.prompt, finish_reason="length", diagnostics=diagnostics)
                return
            text = draft.extend(drawn.token, rules)
            draft.log_z += drawn.log_z
            ended = draft.finish is not None
            yield Delta(
                (drawn.token,),
                text,
                () if drawn.logprob is None else (drawn.logprob,),
                drawn.prompt,
                draft.finish,
                draft.stop,
                _diagnostics(request, weights, names, draft if mode.log_z else None) if ended else None,
            )
            if ended:
                return
    raise EngineError("vLLM ended a completion that goes on.")


async def _accepted(
    source: Source, request: GenerationRequest, weights: Sequence[float], names: Sequence[str], rules: Rules
) -> AsyncGenerator[Delta]:
    """Rejection: `particles` attempts side by side, by the rule of `acceptance`."""
    tempered = [weight / request.sampling.temperature for weight in weights]
    rejection = _Rejection(source, request, tempered, rules)
    tasks = [asyncio.create_task(rejection.work()) for _ in range(request.mode.particles)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    figures = rejection.attempts.figures("Ask for more attempts, or serve with engine: mpo for particles.")
    assert rejection.answer is not None
    draft, text = rejection.answer
    yield Delta(
        tuple(draft.tokens),
        text,
        tuple(draft.logprobs),
        rejection.prompt,
        draft.finish,
        draft.stop,
        _diagnostics(request, tempered, names, draft, **figures),
    )


class _Rejection:
    """What the attempts of one request share. answer: completion and text of the accepted one; prompt: its logprobs"""

    def __init__(self, source: Source, request: GenerationRequest, weights: Sequence[float], rules: Rules) -> None:
        self._source, self._request, self._weights, self._rules = source, request, weights, rules
        self.attempts = Attempts(request.sampling.seed, request.mode.max_attempts)
        self._first_log_z: float | None = None  # the same for all
        self.answer: tuple[Draft, str] | None = None
        self.prompt: tuple[TokenLogprob | None, ...] | None = None

    async def work(self) -> None:
        """Make one attempt after the other until one is accepted or enough were made."""
        while (attempt := self.attempts.begin()) is not None:
            found = await self._completion(attempt)
            if found is not None and self.attempts.accept(attempt):
                self.answer = found

    async def _completion(self, attempt: Attempt) -> tuple[Draft, str] | None:
        seed = int(attempt.random.integers(2**63))
        asked = self._first_log_z is not None  # before anything is drawn
        if self._first_log_z is not None and not attempt.survives(self._first_log_z):
            return None
        first = attempt.number == 0
        parameters = sampling_parameters(
            self._request, self._weights, self._rules, seed, measured=True, temperature=1.0, prompt=first
        )
        draft, text = _draft(self._rules), ""
        name = f"{self._request.id}-{attempt.number}"
        async with aclosing(_tokens(self._source, self._request, name, parameters)) as tokens:
            async for drawn in tokens:
                if drawn.prompt is not None:
                    self.prompt = drawn.prompt
                if not draft.tokens:
                    self._first_log_z = drawn.log_z
                survives = asked or attempt.survives(drawn.log_z)
                asked = False
                if self.attempts.is_late(attempt) or not survives:
                    return None
                text += draft.extend(drawn.token, self._rules)
                draft.log_z += drawn.log_z
                if drawn.logprob is not None:
                    draft.logprobs.append(drawn.logprob)
                if draft.finish is not None:
                    return draft, text
        raise EngineError("vLLM ended an attempt that goes on.")


async def _tokens(
    source: Source, request: GenerationRequest, name: str, parameters: SamplingParams
) -> AsyncGenerator[_Token]:
    """The tokens that vLLM draws, one after the other. Raises EngineError where the logits are not numbers."""
    prompt = {"prompt_token_ids": list(request.prompt_ids), "cache_salt": source.cache_salt}
    told: tuple[TokenLogprob | None, ...] | None = None
    async with aclosing(source.llm.generate(prompt, parameters, name)) as outputs:
        async for output in outputs:
            if output.prompt_logprobs:  # empty after the first output
                told = tuple(_prompt_logprobs(request, output.prompt_logprobs, source.vocab_size))
            [completion] = output.outputs
            for token, table in zip(
                completion.token_ids, completion.logprobs or [None] * len(completion.token_ids), strict=True
            ):
                logprob, log_z = None, math.nan
                if table is not None:
                    logprob, log_z = _read(table, token, request, source.vocab_size)
                yield _Token(token, logprob if request.sampling.num_logprobs is not None else None, log_z, told)
                told = None


def _read(table: Table, token: int, request: GenerationRequest, vocab_size: int) -> tuple[TokenLogprob, float]:
    """A token's log-probability, which its raw logit is, and log Z_t."""
    log_z = read_log_z(*(table[vocab_size + column].logprob for column in range(NUM_COLUMNS)))
    if math.isnan(log_z):
        raise EngineError("the model's logits are not numbers for this request.")
    values = {number: entry.logprob for number, entry in table.items() if number < vocab_size}
    num_top = request.sampling.num_logprobs or 0
    top = tuple(sorted(values.items(), key=lambda item: (-item[1], item[0]))[:num_top])
    shown = log_z if request.mode.log_z or request.mode.kind != "token" else None
    return TokenLogprob(token, values[token], top, log_z=shown), log_z


def _prompt_logprobs(
    request: GenerationRequest, tables: Sequence[Table | None], vocab_size: int
) -> Iterator[TokenLogprob | None]:
    for token, table in zip(request.prompt_ids, tables, strict=True):
        if table is None:
            yield None
            continue
        read, _ = _read(table, token, request, vocab_size)
        yield TokenLogprob(token, read.logprob, read.top)


def sampling_parameters(
    request: GenerationRequest,
    weights: Sequence[float],
    rules: Rules,
    seed: int | None,
    *,
    measured: bool,
    temperature: float | None = None,
    prompt: bool = True,
) -> SamplingParams:
    """measured: whether log Z_t is wanted; the end tokens are among the stop ids, so that vLLM adds none of its own."""
    sampling = request.sampling
    asked = None if sampling.num_logprobs is None and not measured else (sampling.num_logprobs or 0) + NUM_COLUMNS
    return SamplingParams(
        max_tokens=max(1, sampling.max_tokens),
        temperature=sampling.temperature if temperature is None else temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=seed,
        min_tokens=sampling.min_tokens,
        stop_token_ids=list(rules.end_ids),
        ignore_eos=True,
        logprobs=asked,
        prompt_logprobs=(sampling.num_logprobs or 0) + NUM_COLUMNS if sampling.prompt_logprobs and prompt else None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={WEIGHTS: list(weights)},
    )


def _draft(rules: Rules) -> Draft:
    return Draft(0, rules.text_stream(), History())


def _diagnostics(
    request: GenerationRequest,
    weights: Sequence[float],
    names: Sequence[str],
    draft: Draft | None = None,
    **figures: Any,
) -> Diagnostics:
    by_name = dict(zip(names, weights, strict=True))
    return Diagnostics(request.mode.kind, by_name, log_z=None if draft is None else draft.log_z, **figures)
