"""What the endpoint measures of itself: every metric's name and meaning, and the observer that counts.

The same names are shown at /metrics of the endpoint, by prometheus_client, and by Ray at the port of its own metrics
(there with `ray_` in front). docs/operating.md lists them, docs/grafana.json draws them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mpo_ray.decoding.protocol import Diagnostics, Statistics

PREFIX = "mpo_ray_"
#: Seconds after which a replica that says nothing is forgotten.
FORGET_AFTER = 60.0

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
NATS = (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
PARTICLES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A metric. field: of `Statistics`, for what an engine knows; the observer counts the others."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    field: str | None = None


QUANTITIES = (
    Quantity("running", "gauge", "Completions being decoded", ("replica",), field="running"),
    Quantity("waiting", "gauge", "Completions that wait for KV-cache blocks", ("replica",), field="waiting"),
    Quantity(
        "kv_blocks", "gauge", "Blocks of the KV cache, of 16 tokens of one policy", ("replica",), field="kv_blocks"
    ),
    Quantity("kv_blocks_used", "gauge", "Blocks that requests hold", ("replica",), field="kv_blocks_used"),
    Quantity("admitted", "counter", "Completions that got their blocks", ("replica",), field="admitted"),
    Quantity(
        "queue_seconds",
        "counter",
        "Seconds that completions waited for their blocks, summed; by `admitted` it is the mean",
        ("replica",),
        field="queue_seconds",
    ),
    Quantity("time_to_first_token_seconds", "histogram", "From the call to the first token", (), SECONDS),
    Quantity("time_per_output_token_seconds", "histogram", "Mean of a completion after its first token", (), SECONDS),
    Quantity("completion_seconds", "histogram", "From the call to the end of a completion", (), SECONDS),
    Quantity("prompt_tokens", "counter", "Tokens of prompts"),
    Quantity("generated_tokens", "counter", "Tokens that were made"),
    Quantity("finished", "counter", "Completions that came to their end, by finish_reason", ("reason",)),
    Quantity("aborted", "counter", "Completions that ended before: disconnect, timeout, an error", ("reason",)),
    Quantity("rejected", "counter", "HTTP requests that were refused, by the error's code or status", ("reason",)),
    Quantity(
        "minus_log_z_nats",
        "histogram",
        "Minus the sum of log Z_t of a completion: what decoding token by token drops",
        (),
        NATS,
    ),
    Quantity("effective_sample_size", "histogram", "Of the particles of an exact completion", (), PARTICLES),
)
BY_NAME = {quantity.name: quantity for quantity in QUANTITIES}


class Instruments(Protocol):
    """Where quantities are shown."""

    def add(self, name: str, value: float, **labels: str) -> None:
        """Count, or observe one value of a histogram."""


class EndpointMetrics:
    """The endpoint's observer (`Observer`): counts what it hears on every one of `instruments`."""

    def __init__(self, *instruments: Instruments) -> None:
        self._instruments = instruments
        self._open: dict[str, _Completion] = {}

    def request_admitted(self, id: str, prompt_tokens: int, at: float) -> None:
        self._open[id] = _Completion(at)
        self._add("prompt_tokens", prompt_tokens)

    def first_token(self, id: str, at: float) -> None:
        self._open[id].first = at
        self._add("time_to_first_token_seconds", at - self._open[id].began)

    def tokens(self, id: str, count: int, at: float) -> None:
        self._open[id].tokens += count

    def finished(self, id: str, reason: str, diagnostics: Diagnostics | None, at: float) -> None:
        completion = self._close(id)
        self._add("completion_seconds", at - completion.began)
        if completion.first is not None and completion.tokens > 1:
            self._add("time_per_output_token_seconds", (at - completion.first) / (completion.tokens - 1))
        self._add("finished", 1, reason=reason)
        if diagnostics is not None and diagnostics.log_z is not None:
            self._add("minus_log_z_nats", -diagnostics.log_z)
        if diagnostics is not None and diagnostics.effective_sample_size is not None:
            self._add("effective_sample_size", diagnostics.effective_sample_size)

    def aborted(self, id: str, reason: str, at: float) -> None:
        self._close(id)
        self._add("aborted", 1, reason=reason)

    def rejected(self, reason: str, at: float) -> None:
        self._add("rejected", 1, reason=reason)

    def _close(self, id: str) -> _Completion:
        completion = self._open.pop(id)
        self._add("generated_tokens", completion.tokens)
        return completion

    def _add(self, name: str, value: float, **labels: str) -> None:
        for instruments in self._instruments:
            instruments.add(name, value, **labels)


@dataclass(slots=True)
class _Completion:
    began: float
    first: float | None = None
    tokens: int = 0


class Prometheus(Collector):
    """Instruments whose values `page` shows, with what replicas said last of their engines."""

    def __init__(self) -> None:
        self._registry = prometheus_client.CollectorRegistry()
        self._shown = {q.name: self._shown_of(q) for q in QUANTITIES if q.field is None}
        self._replicas: dict[str, tuple[float, Statistics]] = {}
        self._registry.register(self)

    def add(self, name: str, value: float, **labels: str) -> None:
        shown = self._shown[name].labels(**labels) if labels else self._shown[name]
        if isinstance(shown, prometheus_client.Histogram):
            shown.observe(value)
        else:
            shown.inc(value)

    def hear(self, replica: str, statistics: Statistics) -> None:
        """Where a replica's engine stands now."""
        self._replicas[replica] = time.monotonic(), statistics

    def page(self) -> tuple[bytes, str]:
        """The body of /metrics and its content type."""
        return prometheus_client.generate_latest(self._registry), prometheus_client.CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Metric]:
        now = time.monotonic()
        self._replicas = {name: said for name, said in self._replicas.items() if now - said[0] < FORGET_AFTER}
        for quantity in QUANTITIES:
            if quantity.field is None:
                continue
            family = CounterMetricFamily if quantity.kind == "counter" else GaugeMetricFamily
            shown = family(PREFIX + quantity.name, quantity.meaning, labels=quantity.labels)
            for replica, (_, statistics) in self._replicas.items():
                shown.add_metric([replica], float(getattr(statistics, quantity.field)))
            yield shown

    def _shown_of(self, quantity: Quantity) -> prometheus_client.Counter | prometheus_client.Histogram:
        name = PREFIX + quantity.name
        if quantity.kind == "counter":
            return prometheus_client.Counter(name, quantity.meaning, quantity.labels, registry=self._registry)
        return prometheus_client.Histogram(
            name, quantity.meaning, quantity.labels, buckets=quantity.buckets, registry=self._registry
        )
