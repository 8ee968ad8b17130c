"""The board that trainings are taken from: which wait, which worker group is at which, and how each of them ended.

One actor holds it. It knows the trainings by their names alone, so its process imports nothing of what they need.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mpo_ray.cluster.progress import Report

#: How long a board is asked again that cannot be reached, and the pause between two tries, seconds.
UNREACHABLE_S, PAUSE_S = 60.0, 0.5


@dataclass(frozen=True, slots=True)
class News:
    """How things stand. reports: what workers said since the board was last asked

    remarks: every (training, what its user should know) so far; ended: every (training, why it ended early or None) so
    far; taken: group → the training it is at
    """

    reports: list[Report]
    remarks: list[tuple[str, str]]
    ended: list[tuple[str, str | None]]
    taken: dict[int, str]


class TrainingBoard:
    """The actor. A group of one kind of workers takes only the trainings that were put up for that kind.

    Whoever got no answer may ask again: a question that is asked twice changes nothing the second time.
    """

    def __init__(self, waiting: Mapping[int, Sequence[str]]) -> None:
        """waiting: kind of workers → names of its trainings, in their order"""
        self._waiting = {kind: list(names) for kind, names in waiting.items()}
        self._taken: dict[int, str] = {}
        self._ended: list[tuple[str, str | None]] = []
        self._reports: list[tuple[Any, ...]] = []
        self._remarks: list[tuple[str, str]] = []

    def has_work(self, group: int, kind: int) -> bool:
        """Whether the group is at a training that has not ended, or there is another one for it."""
        return group in self._taken or bool(self._waiting[kind])

    def at(self, group: int) -> str | None:
        """The training that the group is at, None where it holds none."""
        return self._taken.get(group)

    def take(self, group: int, kind: int) -> str | None:
        """The training that the group is at, as long as it has not ended; else the next one; None where none is left.

        A group whose workers were started again goes on with the training that they were at.
        """
        if group not in self._taken and self._waiting[kind]:
            self._taken[group] = self._waiting[kind].pop(0)
        return self._taken.get(group)

    def end(self, group: int, name: str, cause: str | None = None) -> None:
        """The group's training is over. cause: why it ended early"""
        if self._taken.get(group) == name:
            del self._taken[group]
            self._ended.append((name, cause))

    def give_up(self, kind: int, causes: Mapping[str, str]) -> None:
        """End trainings of a kind that still wait. causes: why, by the name of each"""
        self._ended += [(name, causes[name]) for name in self._waiting[kind] if name in causes]
        self._waiting[kind] = [name for name in self._waiting[kind] if name not in causes]

    def report(self, *values: Any) -> None:
        """Keep what a worker says until the board is asked. values: those of a `progress.Report`"""
        self._reports.append(values)

    def remark(self, name: str, text: str) -> None:
        """Keep what a training's user should know, unless it was said before."""
        if (name, text) not in self._remarks:
            self._remarks.append((name, text))

    def news(self) -> tuple[Any, ...]:
        """What a `News` is made of."""
        reports, self._reports = self._reports, []
        return reports, list(self._remarks), list(self._ended), dict(self._taken)


class Reporter:
    """What a worker reports of one training to a board's actor; of steps and notes without waiting.

    Raises RayActorError once the board has died: then nobody is left who would take the result.
    """

    def __init__(self, board: Any, name: str) -> None:
        self._board, self._name = board, name
        self._sent: Any = None  # a report that was not yet seen to arrive

    def steps(self, done: int, total: int, **figures: float) -> None:
        """So many steps are done."""
        self._send(done, total, figures)

    def note(self, text: str) -> None:
        """What the worker does that is no step."""
        self._send(0, 0, {}, text)

    def remark(self, text: str) -> None:
        """What the user should know of the training, once it is over too."""
        ask(self._board, "remark", self._name, text)

    def _send(self, *values: Any) -> None:
        if self._sent is not None and ray.wait([self._sent], timeout=0)[0]:
            with suppress(ActorUnavailableError):  # that report is lost, and others follow
                ray.get(self._sent)
            self._sent = None
        sent = self._board.report.remote(self._name, *values)
        self._sent = sent if self._sent is None else self._sent


def put_up(waiting: Mapping[int, Sequence[str]]) -> Any:
    """Start a board on the driver's node, with which it ends; returns its actor."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(TrainingBoard)
    return board.remote({kind: list(names) for kind, names in waiting.items()})


def ask(board: Any, question: str, *values: Any) -> Any:
    """Call a method of a board's actor, again while it cannot be reached.

    Raises RayActorError where its process has died, or is out of reach for longer than a moment.
    """
    deadline = time.monotonic() + UNREACHABLE_S
    while True:
        try:
            return ray.get(getattr(board, question).remote(*values))
        except ActorUnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(PAUSE_S)


def news_of(board: Any) -> News:
    """Ask a board how things stand."""
    reports, *others = ask(board, "news")
    return News([Report(*values) for values in reports], *others)
