"""The engine: requests that join and leave at every step, decoded side by side on one mixture.

A step computes the newest token of every running completion and a bounded piece of the prompts that are joining, in one
pass; then every completion draws. A request is admitted when all KV-cache blocks that it can need are promised to it,
or it waits: nothing admitted can run out of memory. One thread calls it; `engine_thread` puts it behind the protocol.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mpo_ray.decoding.branch import Piece
from mpo_ray.decoding.drafts import Rules
from mpo_ray.decoding.exact_runs import run_of
from mpo_ray.decoding.protocol import (
    Delta,
    EngineError,
    GenerationRequest,
    NothingAcceptedError,
    QueueFullError,
    RequestError,
    Statistics,
)
from mpo_ray.decoding.request_check import check_ends, check_request
from mpo_ray.decoding.runner_protocol import Runner
from mpo_ray.decoding.runs import Place, Run, places_of
from mpo_ray.decoding.token_choice import Draw, choose_tokens
from mpo_ray.out_of_memory import lacking
from mpo_ray.policies.kv_blocks import BLOCK_TOKENS
from mpo_ray.records import REFERENCE, check_weights

#: Tokens of prompts that a step computes, at most, beside the running completions: longer ones would make them stall.
PROMPT_TOKENS = 128

#: In the place of a token, where the logits are NaN.
NOT_NUMBERS = -1

logger = logging.getLogger(__name__)

#: What a step has to say of a request: what was added, or why it ends.
Event = tuple[str, Delta | Exception]


@dataclass(slots=True)
class _Work:
    """A run's part of a step."""

    run: Run
    pieces: list[Piece]
    rows: range


class MixtureEngine:
    """Decodes with `runner`. Not for several threads.

    weights: λ by objective for requests that bring none, in the policies' order
    eos_ids: the model's end tokens; tokenizer: makes the text and finds stop strings; None for token ids alone
    """

    def __init__(
        self,
        runner: Runner,
        weights: Mapping[str, float],
        *,
        eos_ids: Sequence[int],
        tokenizer: Any,
        max_waiting: int = 1024,
        prompt_tokens: int = PROMPT_TOKENS,
    ) -> None:
        self.objectives = tuple(weights)
        self._names = (*self.objectives, REFERENCE) if runner.has_reference else self.objectives
        self._runner, self._weights = runner, dict(weights)
        self._eos_ids, self._tokenizer = tuple(eos_ids), tokenizer
        self._max_waiting, self._prompt_tokens = max_waiting, prompt_tokens
        self._waiting: deque[Run] = deque()
        self._running: dict[str, Run] = {}
        self._ids: set[str] = set()
        self._since: dict[str, float] = {}  # when those that wait came
        self._counts = Statistics(running=0, waiting=0, kv_blocks=runner.kv_blocks, kv_blocks_used=0)

    def __str__(self) -> str:
        """What its KV cache holds."""
        return str(self._runner)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def max_waiting(self) -> int:
        return self._max_waiting

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change λ for requests to come. Raises ValueError off the simplex."""
        self._weights = check_weights(weights, list(self.objectives), where="weights")

    def submit(self, request: GenerationRequest) -> None:
        """Let a request wait for its turn. Raises RequestError for one that can never be served, and QueueFullError."""
        weights = self._weights if request.weights is None else request.weights
        check_request(request, weights, self._runner, self._names)
        if request.id in self._ids:
            raise RequestError(f"a request with the id {request.id!r} is being served.", "id")
        if len(self._waiting) >= self._max_waiting:
            raise QueueFullError(f"{len(self._waiting)} requests are waiting already.")
        rules = Rules.of(request, self._eos_ids, self._tokenizer)
        check_ends(request.sampling, rules.end_ids, self._runner.vocab_size)
        row = [float(weights.get(name, 0.0)) for name in self._names]
        self._waiting.append(run_of(request, row, rules, self._names))
        self._ids.add(request.id)
        self._since[request.id] = time.monotonic()

    def abort(self, request_id: str) -> bool:
        """End a request and free its blocks at once; says whether it was there."""
        if request_id not in self._ids:
            return False
        if request_id in self._running:
            self._release(self._running[request_id])
        else:
            self._waiting = deque(run for run in self._waiting if run.request.id != request_id)
            self._ids.remove(request_id)
            del self._since[request_id]
        self._count(aborted=1)
        return True

    def statistics(self) -> Statistics:
        return replace(
            self._counts,
            running=len(self._running),
            waiting=len(self._waiting),
            kv_blocks_used=self._runner.kv_blocks_used(),
        )

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Go on by one token with everything that runs. Exceptions in the events are those of single requests."""
        self._admit()
        events: list[Event] = []
        work = self._plan()
        if not work:
            return events
        draws: list[tuple[_Work, list[tuple[Place, Draw]]]] = []
        for part, places in self._computed(work, events):
            try:
                wanted = part.run.see(part.pieces, places, self._runner)
                delta = part.run.prompt_only() if wanted is None else None
            except Exception as error:
                self._fail(part.run, error, events)
                continue
            if delta is not None:
                self._tell(part.run, delta, events)
            if wanted is not None:
                draws.append((part, wanted))
        tokens = self._chosen([one for _, wanted in draws for one in wanted])
        self._count(steps=1)
        for part, wanted in draws:
            mine, tokens = tokens[: len(wanted)], tokens[len(wanted) :]
            try:
                if NOT_NUMBERS in mine:
                    raise EngineError("the model's logits are not numbers for this request.")
                delta = part.run.take(mine, wanted)
            except Exception as error:
                self._fail(part.run, error, events)
                continue
            if delta is not None:
                self._tell(part.run, delta, events)
        return events

    def _admit(self) -> None:
        later: list[Run] = []
        while self._waiting and self._runner.fits(self._waiting[0].need):
            run = self._waiting.popleft()
            if self._is_computed_now(run):  # it would compute the same prompt beside it
                later.append(run)
                continue
            lanes, num_computed = self._runner.open(run.need)
            run.start(lanes, num_computed)
            self._running[run.request.id] = run
            waited = time.monotonic() - self._since.pop(run.request.id)
            self._count(admitted=1, queue_seconds=waited, cached_prompt_tokens=num_computed)
        self._waiting.extendleft(reversed(later))

    def _is_computed_now(self, run: Run) -> bool:
        """Whether another request computes this prompt, so that its blocks will soon be there for both."""
        need = run.need
        return (
            self._runner.shares_prompts
            and need.reads_prompt
            and len(need.prompt) > BLOCK_TOKENS
            and any(
                other.prompt_left and other.need.prompt == need.prompt and {*need.policies} <= {*other.policies}
                for other in self._running.values()
            )
        )

    def _plan(self) -> list[_Work]:
        work, row, budget = [], 0, self._prompt_tokens
        for run in self._running.values():
            before = run.prompt_left
            if before and budget <= 0:
                continue
            pieces = run.pieces(budget)
            if before:
                computed = sum(len(piece.tokens) for piece in pieces)
                budget -= computed
                self._count(prompt_tokens=computed)
            wanted = sum(piece.wanted for piece in pieces)
            work.append(_Work(run, pieces, range(row, row + wanted)))
            row += wanted
        return work

    def _computed(self, work: Sequence[_Work], events: list[Event]) -> Iterator[tuple[_Work, list[Place]]]:
        """Every part of the step with its places. If the pass fails, each run has one of its own, and fails alone."""
        try:
            predictions = self._runner.run([piece for part in work for piece in part.pieces])
        except Exception as error:
            if len(work) == 1:
                self._fail(work[0].run, error, events)
                return
            logger.exception("a pass of %d requests failed; they go on one by one", len(work))
            for part in work:
                yield from self._computed([replace(part, rows=range(len(part.rows)))], events)
            return
        log_z = predictions.log_z.tolist()
        for part in work:
            yield part, places_of(predictions, log_z, part.rows)

    @staticmethod
    def _chosen(draws: Sequence[tuple[Place, Draw]]) -> list[int]:
        """A token for every draw, or NOT_NUMBERS."""
        if not draws:
            return []
        logits = torch.stack([place.logits for place, _ in draws])
        bad = logits.amax(-1).isnan().tolist()
        if any(bad):
            logits = logits.nan_to_num()
        tokens = choose_tokens(logits, [draw for _, draw in draws])
        return [NOT_NUMBERS if unusable else token for token, unusable in zip(tokens, bad, strict=True)]

    def _tell(self, run: Run, delta: Delta, events: list[Event]) -> None:
        events.append((run.request.id, delta))
        self._count(generated_tokens=len(delta.tokens))
        if run.finished:
            self._release(run)
            self._count(finished=1)

    def _fail(self, run: Run, error: Exception, events: list[Event]) -> None:
        if not isinstance(error, NothingAcceptedError):
            logger.error("request %s failed", run.request.id, exc_info=error)
            if not isinstance(error, EngineError):
                told = EngineError(_in_words(error))
                told.__cause__ = error  # so that `lacking` finds it
                error = told
        events.append((run.request.id, error))
        self._release(run, spoiled=not isinstance(error, NothingAcceptedError))
        self._count(failed=1)

    def _release(self, run: Run, *, spoiled: bool = False) -> None:
        del self._running[run.request.id]
        self._ids.remove(run.request.id)
        self._runner.close(run.lanes, spoiled=spoiled)

    def _count(self, **added: float) -> None:
        self._counts = replace(self._counts, **{name: getattr(self._counts, name) + n for name, n in added.items()})


def _in_words(error: Exception) -> str:
    """What an error of a pass means for whoever waits for the completion; the log has the rest."""
    lack = lacking(error)
    if lack is None:
        return f"{type(error).__name__} while decoding"
    return (
        f"decoding: out of memory: {lack} could not be had. Lower kv_cache_gib, max_num_seqs or prompt_tokens_per_step."
    )
