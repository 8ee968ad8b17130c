"""The board that trainings are taken from: which wait, which worker group is at which, and how each of them ended.

One actor holds it. It knows the trainings by their names alone, so its process imports nothing of what they need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mpo_ray.cluster.progress import Report


@dataclass(frozen=True, slots=True)
class News:
    """What happened since the board was last asked, and how things stand.

    reports: what workers said; ended: (training, why it ended early or None); taken: group → the training it is at
    """

    reports: list[Report]
    ended: list[tuple[str, str | None]]
    taken: dict[int, str]


class TrainingBoard:
    """The actor. A group of one kind of workers takes only the trainings that were put up for that kind."""

    def __init__(self, waiting: Mapping[int, Sequence[str]]) -> None:
        """waiting: kind of workers → names of its trainings, in their order"""
        self._waiting = {kind: list(names) for kind, names in waiting.items()}
        self._taken: dict[int, str] = {}
        self._ended: list[tuple[str, str | None]] = []
        self._reports: list[tuple[Any, ...]] = []

    def has_work(self, group: int, kind: int) -> bool:
        """Whether the group is at a training that has not ended, or there is another one for it."""
        return group in self._taken or bool(self._waiting[kind])

    def take(self, group: int, kind: int) -> str | None:
        """The training that the group is at, as long as it has not ended; else the next one; None where none is left.

        A group whose workers were started again goes on with the training that they were at.
        """
        if group not in self._taken and self._waiting[kind]:
            self._taken[group] = self._waiting[kind].pop(0)
        return self._taken.get(group)

    def end(self, group: int, cause: str | None = None) -> None:
        """The group's training is over. cause: why it ended early"""
        self._ended.append((self._taken.pop(group), cause))

    def report(self, *values: Any) -> None:
        """Keep what a worker says until the board is asked. values: those of a `progress.Report`"""
        self._reports.append(values)

    def news(self) -> tuple[list[tuple[Any, ...]], list[tuple[str, str | None]], dict[int, str]]:
        """What a `News` is made of."""
        reports, self._reports = self._reports, []
        ended, self._ended = self._ended, []
        return reports, ended, dict(self._taken)


def put_up(waiting: Mapping[int, Sequence[str]]) -> Any:
    """Start a board on the driver's node, with which it ends; returns its actor."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(TrainingBoard)
    return board.remote({kind: list(names) for kind, names in waiting.items()})


def news_of(board: Any) -> News:
    """Ask a board."""
    reports, ended, taken = ray.get(board.news.remote())
    return News([Report(*values) for values in reports], ended, taken)
