"""vLLM behind the engine protocol: the endpoint asks it for what it asks our own engine for.

vLLM's asynchronous engine lives in an event loop of its own, in a thread, because callers have theirs.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from mpo_ray.config import ConfigError
from mpo_ray.data.rendering import artefact_ends
from mpo_ray.decoding.drafts import Rules
from mpo_ray.decoding.need import Need, too_many
from mpo_ray.decoding.pace import Pace
from mpo_ray.decoding.protocol import (
    Delta,
    EngineError,
    GenerationRequest,
    NothingAcceptedError,
    QueueFullError,
    RequestError,
    Statistics,
    every_token,
)
from mpo_ray.decoding.request_check import check_ends, check_request
from mpo_ray.policies.artefact import check_artefact
from mpo_ray.policies.loading import load_tokenizer
from mpo_ray.policies.mixture_config import MixtureConfig
from mpo_ray.records import check_weights
from mpo_ray.vllm_plugin.arguments import engine_arguments, set_environment, whole_pages
from mpo_ray.vllm_plugin.log_z import NUM_COLUMNS

#: The likeliest tokens that a request may ask for at each place.
MOST_LOGPROBS = 20

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Room:
    """As `request_check.Room`: vLLM lets a request wait until it has pages for it."""

    vocab_size: int
    context: int
    max_num_seqs: int

    def refusal(self, need: Need) -> str | None:
        return too_many(need.num_seqs, self.max_num_seqs) if need.num_seqs > self.max_num_seqs else None


@dataclass(slots=True)
class _Flight:
    """A request on its way. tell: hands an item to whoever waits for it; None ends the wait."""

    tell: Callable[[Delta | Exception | None], None]
    pace: Pace
    future: Future[None] | None = None
    ended: bool = False


class VllmEngine:
    """An `Engine` (protocol) over a mixture artefact in vLLM. `close` ends it.

    max_num_seqs: completions that vLLM runs at a time, at most; context: tokens of one, the model's own if None
    weights: in the place of the artefact's; arguments: further ones of vLLM's `AsyncEngineArgs`
    cache_salt: names the artefact, so that no store of caches that outlives an engine mixes two
    """

    def __init__(
        self,
        artefact: str,
        *,
        max_num_seqs: int,
        context: int | None = None,
        weights: Mapping[str, float] | None = None,
        max_waiting: int = 1024,
        stuck_after: float = 120.0,
        cache_salt: str = "",
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises ModelError, ConfigError, ValueError; EngineError where vLLM does not start: its log has the cause."""
        config = MixtureConfig.from_pretrained(artefact)
        check_artefact(Path(artefact), config)
        self.objectives = tuple(config.objectives)
        self.set_weights(config.weights if weights is None else weights)
        self._tokenizer = load_tokenizer(artefact)
        self._eos_ids = artefact_ends(GenerationConfig.from_pretrained(artefact), self._tokenizer)
        self._max_num_seqs, self._max_waiting, self._stuck_after = max_num_seqs, max_waiting, stuck_after
        limits = [limit for limit in (context, config.max_position_embeddings) if limit is not None]
        if not limits:
            raise ConfigError("serve.context: the model names no limit of its own; set how long a sequence may be.")
        self._room = _Room(config.vocab_size, min(limits), max_num_seqs)
        self._flights: dict[str, _Flight] = {}
        self._counts, self._counting = Statistics(running=0, waiting=0, kv_blocks=0, kv_blocks_used=0), threading.Lock()
        self._moved = time.monotonic()  # when vLLM last said something, or had nothing to do
        self._failure: str | None = None
        set_environment()
        from vllm import AsyncEngineArgs

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-engine", daemon=True)
        self._thread.start()
        try:
            settings = engine_arguments(
                artefact,
                config,
                AsyncEngineArgs,
                {
                    "logprobs_mode": "raw_logits",  # what carries log Z_t
                    "max_logprobs": MOST_LOGPROBS + NUM_COLUMNS,
                    "max_num_seqs": max_num_seqs,
                    "max_model_len": self._room.context,
                },
                arguments or {},
                where="serve.vllm",
                kept_tokens=(max_num_seqs + 1) * whole_pages(self._room.context),
            )
            self._source = self._run(self._open(settings, config.vocab_size, cache_salt)).result()
        except BaseException:
            self._end_loop()
            raise
        self._count(kv_blocks=int(self._source.llm.vllm_config.cache_config.num_gpu_blocks or 0))

    def __str__(self) -> str:
        """What its KV cache holds."""
        return f"{self._counts.kv_blocks:,} KV-cache blocks of vLLM's"

    async def generate(
        self, request: GenerationRequest, tokens_per_delta: Callable[[], float] = every_token
    ) -> AsyncIterator[Delta]:
        """Yield what is added; leaving the iterator aborts the request. Raises as the protocol says."""
        from mpo_ray.vllm_plugin.completions import complete, refuse

        if self._failure is not None:
            raise EngineError(self._failure)
        given = self._weights if request.weights is None else request.weights
        check_request(request, given, self._room, self.objectives)
        rules = Rules.of(request, self._eos_ids, self._tokenizer)
        check_ends(request.sampling, rules.end_ids, self._room.vocab_size)
        refuse(request)
        if request.id in self._flights:
            raise RequestError(f"a request with the id {request.id!r} is being served.", "id")
        if len(self._flights) >= self._max_num_seqs + self._max_waiting:
            raise QueueFullError(f"{self._max_waiting} requests are waiting already.")
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Delta | Exception | None]()
        flight = _Flight(lambda item: _hand_over(loop, queue, item), Pace(tokens_per_delta))
        if not self._flights:
            self._moved = time.monotonic()
        self._flights[request.id] = flight
        row = [float(given.get(name, 0.0)) for name in self.objectives]
        deltas = complete(self._source, request, row, self.objectives, rules)
        flight.future = self._run(self._decode(request.id, flight, deltas))
        flight.future.add_done_callback(lambda _: self._end(request.id, flight, "aborted"))
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            if not flight.ended:
                flight.future.cancel()

    async def abort(self, request_id: str) -> None:
        flight = self._flights.get(request_id)
        if flight is not None and flight.future is not None:
            flight.future.cancel()
            flight.tell(None)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        self._weights = check_weights(weights, list(self.objectives), where="weights")

    def check_health(self) -> None:
        if self._failure is None and (not self._thread.is_alive() or self._source.llm.errored):
            self._fail("vLLM has ended; its log has the cause.")
        still = time.monotonic() - self._moved
        if self._failure is None and self._flights and still > self._stuck_after:
            self._fail(f"vLLM has said nothing for {still:.0f} s.")
        if self._failure is not None:
            raise EngineError(self._failure)

    def statistics(self) -> Statistics:
        if not self._flights:  # vLLM tells of its steps alone, and not that it has come to an end
            return replace(self._counts, running=0, waiting=0, kv_blocks_used=0)
        running = min(self._counts.running, len(self._flights))
        return replace(self._counts, running=running, waiting=len(self._flights) - running)

    def close(self) -> None:
        """End vLLM's processes; what is being decoded ends with an EngineError."""
        self._fail("the engine is closed.")
        self._run(self._shut_down()).result()
        self._end_loop()

    async def _open(self, settings: Mapping[str, Any], vocab_size: int, cache_salt: str) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from mpo_ray.vllm_plugin.completions import Source
        from mpo_ray.vllm_plugin.step_log import StepLog

        arguments = AsyncEngineArgs(**settings)
        try:
            llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[lambda config, index: StepLog(self._heard)])
        except RuntimeError as error:
            raise EngineError(f"vLLM does not start: {error}") from error
        return Source(llm, vocab_size, cache_salt)

    async def _shut_down(self) -> None:
        self._source.llm.shutdown()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _decode(self, request_id: str, flight: _Flight, deltas: Any) -> None:
        from vllm.exceptions import VLLMValidationError

        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    self._count(generated_tokens=len(delta.tokens))
                    if delta.finish_reason is not None:
                        self._end(request_id, flight, "finished")
                    if (told := flight.pace.add(delta)) is not None:
                        flight.tell(told)
            return
        except (RequestError, NothingAcceptedError, EngineError) as error:
            failure: Exception = error
        except VLLMValidationError as error:
            failure = RequestError(f"{error.args[0]}", error.parameter or "sampling")
        except Exception as error:
            logger.exception("a request failed")
            failure = EngineError(f"{type(error).__name__} while decoding")
        self._end(request_id, flight, "failed")
        if (told := flight.pace.rest()) is not None:
            flight.tell(told)
        flight.tell(failure)

    def _end(self, request_id: str, flight: _Flight, how: str) -> None:
        """Count a request's end, once, and forget it."""
        if not flight.ended:
            flight.ended = True
            self._flights.pop(request_id, None)
            self._count(**{how: 1})

    def _heard(self, **figures: float) -> None:
        """A step of vLLM's: counts that grow are added, moments take the place of the last."""
        self._moved = time.monotonic()
        running, usage = int(figures.pop("running")), figures.pop("usage")
        with self._counting:
            self._counts = replace(self._counts, running=running, kv_blocks_used=round(usage * self._counts.kv_blocks))
        self._count(steps=1, **figures)

    def _count(self, **added: float) -> None:
        """Called by this engine's thread and by those of its callers."""
        with self._counting:
            grown = {name: getattr(self._counts, name) + n for name, n in added.items()}
            self._counts = replace(self._counts, **grown)

    def _fail(self, reason: str) -> None:
        self._failure = reason
        for request_id, flight in list(self._flights.items()):
            self._end(request_id, flight, "failed")
            flight.tell(EngineError(reason))
            if flight.future is not None:
                flight.future.cancel()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _hand_over(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any], item: Any) -> None:
    try:
        loop.call_soon_threadsafe(queue.put_nowait, item)
    except RuntimeError:  # the event loop was closed: nobody waits any more
        logger.debug("an item came after its event loop was closed")
