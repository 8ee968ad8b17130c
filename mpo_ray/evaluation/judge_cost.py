"""What a judge may cost: an estimate before each request, the true price after it, and a cap that is not exceeded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

BYTES_PER_TOKEN = 3
MILLION = 1_000_000


class CapReachedError(Exception):
    """The next request might exceed the cost cap."""


@dataclass(frozen=True, slots=True)
class Promise:
    """Money set aside for one request."""

    budget: Budget
    text: str
    price: float

    def settle(self, usage: tuple[int, int] | None) -> float:
        """Count the request as paid and return its price: the estimate where `usage` is None.

        usage: prompt tokens and completion tokens, as the server counted them
        """
        return self.budget._settle(self, usage)


class Budget:
    """Money spent and promised, shared by the threads that send requests.

    A request is promised its estimate before it is sent: UTF-8 bytes / 3 as prompt tokens, times the largest ratio of
    true to estimated prompt tokens seen so far (at least 1), and `max_tokens` of output. `usage` in its answer replaces
    the estimate. So spent + promised stays at or below the cap, as far as the estimates are not too low.
    """

    def __init__(
        self,
        *,
        input_price: float = 0.0,
        output_price: float = 0.0,
        max_tokens: int,
        cap: float | None = None,
        spent: float = 0.0,
    ) -> None:
        """input_price, output_price: per million tokens, in the unit of `cap` and `spent`; no cap if None."""
        self._prices = (input_price / MILLION, output_price / MILLION)
        self._max_tokens = max_tokens
        self.cap = cap
        self.spent = spent
        self._promised: list[float] = []
        self._waiting: list[object] = []
        self._ratio = 1.0
        self._stopped = False
        self._changed = threading.Condition()

    def estimate(self, text: str) -> float:
        """The price of one request by estimate."""
        return self._price(self._ratio * _prompt_tokens(text), self._max_tokens)

    @contextmanager
    def promise(self, text: str) -> Iterator[Promise]:
        """Set a request's estimate aside for the block; it is given back if the block does not settle it.

        Waits, in the order of the calls, while other requests are under way that may turn out cheaper than promised.
        Raises CapReachedError if the request might exceed the cap, and from then on for every request.
        """
        promise = Promise(self, text, self._reserve(text))
        try:
            yield promise
        finally:
            with self._changed:
                self._promised.remove(promise.price)
                self._changed.notify_all()

    def _reserve(self, text: str) -> float:
        with self._changed:
            turn = object()
            self._waiting.append(turn)
            try:
                while not self._stopped:
                    if self._waiting[0] is turn:
                        price = self.estimate(text)
                        if self.cap is None or self.spent + sum(self._promised) + price <= self.cap:
                            self._promised.append(price)
                            return price
                        self._stopped = not self._promised
                    if not self._stopped:
                        self._changed.wait()
                raise CapReachedError
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()

    def _settle(self, promise: Promise, usage: tuple[int, int] | None) -> float:
        with self._changed:
            cost = promise.price
            if usage is not None:
                cost = self._price(*usage)
                self._ratio = max(self._ratio, usage[0] / _prompt_tokens(promise.text))
            self.spent += cost
            return cost

    def _price(self, prompt_tokens: float, completion_tokens: float) -> float:
        return self._prices[0] * prompt_tokens + self._prices[1] * completion_tokens


def _prompt_tokens(text: str) -> float:
    return max(1.0, len(text.encode("utf-8")) / BYTES_PER_TOKEN)
