"""The endpoint's metrics on Ray's own page, where the cluster's Prometheus finds them."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

from mpo_ray.decoding.protocol import Statistics
from mpo_ray.serving.metrics import PREFIX, QUANTITIES, Quantity


class RayInstruments:
    """Instruments in the process that makes them. engine: of the quantities that an engine knows, or the others."""

    def __init__(self, *, engine: bool) -> None:
        self._shown = {q.name: _shown(q) for q in QUANTITIES if (q.field is not None) is engine}
        self._counted: dict[str, float] = {}

    def add(self, name: str, value: float, **labels: str) -> None:
        shown = self._shown[name]
        if isinstance(shown, Histogram):
            shown.observe(value, tags=labels)
        elif value > 0:
            shown.inc(value, tags=labels)

    def hear(self, replica: str, statistics: Statistics) -> None:
        """Show where this replica's engine stands now."""
        for quantity in QUANTITIES:
            if quantity.field is None:
                continue
            value = float(getattr(statistics, quantity.field))
            if quantity.kind == "gauge":
                self._shown[quantity.name].set(value, tags={"replica": replica})
            else:
                self.add(quantity.name, value - self._counted.get(quantity.name, 0.0), replica=replica)
                self._counted[quantity.name] = value


def _shown(quantity: Quantity) -> Counter | Gauge | Histogram:
    name, keys = PREFIX + quantity.name, quantity.labels
    if quantity.kind == "histogram":
        return Histogram(name, description=quantity.meaning, boundaries=list(quantity.buckets), tag_keys=keys)
    kind = Counter if quantity.kind == "counter" else Gauge
    return kind(name, description=quantity.meaning, tag_keys=keys)
