"""Figures of a training run as metrics of the Ray cluster, where Prometheus finds them (docs/mopo.md names them)."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

from mpo_ray.cluster.tasks import Figures
from mpo_ray.cluster.training_job import TrainingJob

PREFIX = "mpo_ray_training"


class TrainingMetrics:
    """A gauge per quantity. Tags: `run`, `training` (the job's name; `job` is Prometheus' own) and `objective`."""

    def __init__(self, job: TrainingJob) -> None:
        self._tags = {"run": job.run_root.rstrip("/").rpartition("/")[2], "training": job.name}
        self._gauges: dict[str, Gauge] = {}

    def show(self, figures: Figures) -> None:
        for quantity, value in figures.items():
            rows = value if isinstance(value, Mapping) else {"": value}
            for objective, number in rows.items():
                self._gauge(quantity).set(number, tags={**self._tags, "objective": objective})

    def _gauge(self, quantity: str) -> Gauge:
        if quantity not in self._gauges:
            self._gauges[quantity] = Gauge(
                f"{PREFIX}_{quantity}",
                description=f"{quantity.replace('_', ' ')} of a training run at its latest reported step",
                tag_keys=("run", "training", "objective"),
            )
        return self._gauges[quantity]


def flat(figures: Figures) -> dict[str, float]:
    """`quantity`, or `quantity_objective` where there is one for each."""
    found: dict[str, float] = {}
    for quantity, value in figures.items():
        if isinstance(value, Mapping):
            found.update({f"{quantity}_{objective}": number for objective, number in value.items()})
        else:
            found[quantity] = value
    return found
