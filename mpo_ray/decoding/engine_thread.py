"""The engine in a thread of its own, behind the protocol: whoever awaits a token never waits for a step to end.

Requests and aborts are handed over between steps, the requests of one turn of an event loop together; what a step adds
goes at once to the event loops that wait.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from mpo_ray.decoding.engine import Event, MixtureEngine
from mpo_ray.decoding.pace import Pace
from mpo_ray.decoding.protocol import (
    Delta,
    EngineError,
    GenerationRequest,
    QueueFullError,
    Statistics,
    every_token,
)

#: Seconds that a step may take before the engine counts as stuck.
STUCK_AFTER = 120.0

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Stream:
    """Where a request's deltas go: a queue of the event loop that waits for them. None ends it."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Delta | Exception | None]
    pace: Pace

    def ending(self, error: Exception) -> list[_Item]:
        """What was held, then the error."""
        rest = self.pace.rest()
        return [*([] if rest is None else [(self, rest)]), (self, error)]


#: A delta or an error on its way to a stream.
_Item = tuple[_Stream, Delta | Exception | None]


class EngineThread:
    """An `Engine` (protocol) that decodes here. `close` ends it."""

    def __init__(self, engine: MixtureEngine, *, stuck_after: float = STUCK_AFTER) -> None:
        self.objectives = engine.objectives
        self._engine, self._stuck_after = engine, stuck_after
        self._commands: deque[Callable[[], None]] = deque()
        self._gathered: defaultdict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = defaultdict(list)
        self._num_submitted = 0  # requests that the engine has not been given yet
        self._streams: dict[str, _Stream] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._failure: str | None = None
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="mixture-engine", daemon=True)
        self._thread.start()

    def __str__(self) -> str:
        """What its KV cache holds."""
        return str(self._engine)

    async def generate(
        self, request: GenerationRequest, tokens_per_delta: Callable[[], float] = every_token
    ) -> AsyncIterator[Delta]:
        """Yield what is added; leaving the iterator aborts the request. Raises as the protocol says."""
        if self._failure is not None:
            raise EngineError(self._failure)
        if self._engine.num_waiting + self._num_submitted >= self._engine.max_waiting:
            raise QueueFullError(f"{self._engine.max_waiting} requests are waiting already.")
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue(), Pace(tokens_per_delta))
        self._num_submitted += 1
        self._gathered[stream.loop].append(lambda: self._submit(request, stream))
        stream.loop.call_soon(self._hand_in, stream.loop)  # with what else comes in this turn: it begins in one step
        finished = False
        try:
            while not finished:
                item = await stream.queue.get()
                if item is None:
                    finished = True
                elif isinstance(item, Exception):
                    finished = True
                    raise item
                else:
                    finished = item.finish_reason is not None
                    yield item
        finally:
            if not finished:
                self._command(stream.loop, lambda: self._abort(request.id, stream))

    async def abort(self, request_id: str) -> None:
        self._command(asyncio.get_running_loop(), lambda: self._abort(request_id, None))

    def set_weights(self, weights: Mapping[str, float]) -> None:
        self._engine.set_weights(weights)

    def check_health(self) -> None:
        if self._failure is not None or not self._thread.is_alive():
            raise EngineError(self._failure or "the engine has ended.")
        busy_since = self._busy_since
        if busy_since is not None and (seconds := time.monotonic() - busy_since) > self._stuck_after:
            self._end(f"the engine has been in one step for {seconds:.0f} s.")  # nobody waits for it any longer
            raise EngineError(self._failure or "")

    def statistics(self) -> Statistics:
        return self._engine.statistics()

    def close(self) -> None:
        """End after the step that runs; what is being decoded ends with an EngineError."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _command(self, loop: asyncio.AbstractEventLoop, command: Callable[[], None]) -> None:
        """Have it done before the next step, after what was gathered in this loop."""
        self._gathered[loop].append(command)
        self._hand_in(loop)

    def _hand_in(self, loop: asyncio.AbstractEventLoop) -> None:
        commands = self._gathered.pop(loop, [])
        with self._changed:
            if self._failure is None:
                self._commands += commands
                self._changed.notify()
                return
        for command in commands:  # which find that the engine has ended
            command()

    def _submit(self, request: GenerationRequest, stream: _Stream) -> None:
        self._num_submitted -= 1
        try:
            if self._failure is not None:
                raise EngineError(self._failure)
            self._engine.submit(request)
        except (ValueError, QueueFullError, EngineError) as error:
            _hand_over(stream.loop, [(stream, error)])
        else:
            self._streams[request.id] = stream

    def _abort(self, request_id: str, stream: _Stream | None) -> None:
        """stream: of the request that is meant, None for any"""
        current = self._streams.get(request_id)
        if current is not None and stream in (None, current):
            del self._streams[request_id]
            self._engine.abort(request_id)
            _hand_over(current.loop, [(current, None)])

    def _run(self) -> None:
        try:
            while self._wait() and self._failure is None:
                self._busy_since = time.monotonic()
                self._deliver(self._engine.step())
                self._busy_since = None
            self._end("the engine is closed.")
        except Exception:
            logger.exception("the engine has ended")
            self._end("the engine has ended after an error; its log has the cause.")

    def _wait(self) -> bool:
        """Wait for work, and take in what was commanded; returns False once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._commands or self._engine.has_work or self._closed)
            commands, self._commands = self._commands, deque()
            closed = self._closed
        for command in commands:
            command()
        return not closed

    def _deliver(self, events: list[Event]) -> None:
        """Hand every loop its items of this step in one call: loops that are woken take time from the next step."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Item]] = defaultdict(list)
        for request_id, item in events:
            stream = self._streams.get(request_id)
            if stream is None:  # given up while this step took too long
                continue
            if isinstance(item, Exception):
                by_loop[stream.loop] += stream.ending(item)
            elif (told := stream.pace.add(item)) is not None:
                by_loop[stream.loop].append((stream, told))
            if isinstance(item, Exception) or item.finish_reason is not None:
                self._streams.pop(request_id, None)
        for loop, items in by_loop.items():
            _hand_over(loop, items)

    def _end(self, reason: str) -> None:
        with self._changed:
            reason = self._failure = self._failure or reason  # the first is the cause
            streams, self._streams = self._streams, {}
            commands, self._commands = self._commands, deque()
        for stream in streams.values():
            _hand_over(stream.loop, stream.ending(EngineError(reason)))
        for command in commands:
            command()


def _hand_over(loop: asyncio.AbstractEventLoop, items: list[_Item]) -> None:
    def put() -> None:
        for stream, item in items:
            stream.queue.put_nowait(item)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:  # the event loop was closed: nobody waits any more
        logger.debug("%d items came after their event loop was closed", len(items))
