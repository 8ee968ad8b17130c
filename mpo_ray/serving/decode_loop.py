"""One thread that decodes all the completions of a replica, a token of each in turn, off the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mpo_ray.decoding.sampling import stream_tokens
from mpo_ray.serving.text_stream import TextStream


@dataclass(frozen=True, slots=True)
class Generation:
    """One completion to make. `weights`: λ by objective, in full, or None for the model's own."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    weights: Mapping[str, float] | None


@dataclass(frozen=True, slots=True)
class Delta:
    """What one token added to completion `index`: text, perhaps none; `finish_reason` is set on the last one."""

    index: int
    text: str
    num_tokens: int
    finish_reason: str | None = None


@dataclass(slots=True)
class _Active:
    """A completion that the thread works on; items go to `queue` of the event loop that waits for them."""

    index: int
    tokens: Iterator[int]
    text: TextStream
    eos_ids: Sequence[int]
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Delta | Exception]
    cancelled: threading.Event = field(default_factory=threading.Event)

    def send(self, item: Delta | Exception) -> None:
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:  # the event loop was closed: nobody waits any more
            self.cancelled.set()


class DecodeLoop:
    """Decodes with one mixture. Completions take turns, token by token; a cancelled one is dropped before its next."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        ends = model.generation_config.eos_token_id
        self._model, self._tokenizer = model, tokenizer
        self._eos_ids: list[int] = ends if isinstance(ends, list) else [ends]
        self._active: deque[_Active] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_active(self) -> int:
        return len(self._active)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    async def generate(self, generations: Sequence[Generation]) -> AsyncGenerator[Delta]:
        """Yield what is added to any of the completions, as it comes; leaving the iterator cancels those unfinished."""
        queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        started = [self._start(index, generation, queue) for index, generation in enumerate(generations)]
        with self._changed:
            self._active += started
            self._changed.notify()
        unfinished = len(started)
        try:
            while unfinished:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                unfinished -= item.finish_reason is not None
                yield item
        finally:
            for one in started:
                one.cancelled.set()

    def _start(self, index: int, generation: Generation, queue: asyncio.Queue[Delta | Exception]) -> _Active:
        generator = torch.Generator()
        if generation.seed is None:
            generator.seed()
        else:
            generator.manual_seed(generation.seed)
        text = TextStream(self._tokenizer, generation.stop)
        weights = generation.weights or self._model.config.weights
        tokens = stream_tokens(
            self._model,
            generation.prompt_ids,
            max_new_tokens=generation.max_new_tokens,
            temperature=generation.temperature,
            top_p=generation.top_p,
            eos_ids=self._eos_ids,
            generator=generator,
            weights=torch.tensor([weights[name] for name in self._model.objectives]),
        )
        return _Active(index, tokens, text, self._eos_ids, asyncio.get_running_loop(), queue)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._active or self._closed)
                if self._closed:
                    return
                current = self._active[0]
            if not current.cancelled.is_set():
                _advance(current)
            with self._changed:
                self._active.popleft()
                if not current.cancelled.is_set():
                    self._active.append(current)


def _advance(one: _Active) -> None:
    """Decode the next token of a completion and send what it added."""
    try:
        token = next(one.tokens, None)
        if token is None:
            finish, added, text = "length", 0, one.text.finish()
        elif token in one.eos_ids:
            finish, added, text = "stop", 1, one.text.finish()
        else:
            finish, added, text = None, 1, one.text.push(token)
            if one.text.stopped:
                finish = "stop"
    except Exception as error:
        one.cancelled.set()
        one.send(error)
        return
    if finish is not None:
        one.cancelled.set()
    one.send(Delta(one.index, text, added, finish))
