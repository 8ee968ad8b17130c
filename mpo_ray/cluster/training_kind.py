"""The trainings that need the same workers, and the groups that do them: how many, and what if one cannot start."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import Any

from mpo_ray.cluster.training_board import News, ask
from mpo_ray.cluster.training_failure import found_no_room
from mpo_ray.cluster.training_group import Group, told
from mpo_ray.cluster.training_job import TrainingJob
from mpo_ray.cluster.training_room import Outlook, num_free, num_side_by_side
from mpo_ray.config_training import Workers

#: How often in a row the only group of a kind may end before it holds a training.
MOST_STARTS = 3
#: How long no further group is started beside others after one that could not start, seconds.
ALONE_S = 120.0


class Kind:
    """The trainings of one kind of workers. jobs: by name, in their order"""

    def __init__(self, number: int, jobs: dict[str, TrainingJob]) -> None:
        self.number, self.jobs = number, jobs
        self.workers: Workers = next(iter(jobs.values())).training.workers
        self.groups: dict[Future[Exception | None], Group] = {}
        self._taken: dict[int, str] = {}  # group → the training it is at
        self._begun: set[int] = set()  # groups that have held a training
        self._outlook = Outlook()
        self._num_ended = self._num_failed_starts = 0
        self._alone_until = float("-inf")

    @property
    def starting(self) -> list[Group]:
        """Groups that hold no training yet."""
        return [group for group in self.groups.values() if group.number not in self._taken]

    @property
    def at_work(self) -> list[Future[Exception | None]]:
        """Groups that have held a training."""
        return [future for future, group in self.groups.items() if group.number in self._begun]

    @property
    def is_at_work(self) -> bool:
        return bool(self.at_work)

    def waiting(self, names: Collection[str]) -> list[str]:
        """Of the open trainings with these names, those of this kind that no group is at."""
        return [name for name in self.jobs if name in names and name not in self._taken.values()]

    def hear(self, news: News) -> None:
        """Take what the board says of this kind's groups and trainings."""
        numbers = {group.number for group in self.groups.values()}
        self._taken = {number: name for number, name in news.taken.items() if number in numbers}
        self._begun |= self._taken.keys()
        if self._taken:
            self._outlook.begin()
        num_ended = sum(name in self.jobs for name, _ in news.ended)
        if self._taken or num_ended > self._num_ended:
            self._num_failed_starts = 0
        self._num_ended = num_ended
        for report in news.reports:
            if report.task in self.jobs and not report.note:
                self._outlook.hear(report)

    def num_more(self, num_waiting: int, starting: Sequence[Workers]) -> int:
        """How many more groups to start for so many trainings that wait. starting: the groups of all kinds that start

        The first waits for its resources. Another is started only where they are free, so that none still waits when
        everything is done, and where it is worth its start; not while one starts: what that takes cannot be seen yet.
        """
        if not self.groups:
            return min(1, num_waiting)
        alone = time.monotonic() < self._alone_until
        if not num_waiting or alone or self.starting or not self._outlook.is_worth(num_waiting):
            return 0
        room = num_side_by_side(self.workers) - len(self.groups)
        return min(num_waiting, room, num_free(self.workers, before=starting))

    def start(self, number: int, board: Any) -> None:
        """Start a group."""
        group = Group(number, self.number, self.jobs, board)
        self.groups[_in_background(group)] = group

    def collect(self, board: Any, names: Collection[str]) -> None:
        """Let go of the groups that have ended. names: of the open trainings

        One that could not start is not replaced while others are at work. Where it was the only one, the next try is
        another group; after `MOST_STARTS` the trainings that wait are given up. Raises RayActorError where the board
        has died.
        """
        for future in [one for one in self.groups if one.done()]:
            group, error = self.groups.pop(future), future.result()
            if error is None:
                continue
            if self.groups:
                self._alone_until = time.monotonic() + ALONE_S
                continue
            if group.number in self._begun or found_no_room(error):
                continue  # it started; or what it needs is waited for, however long others have it
            self._num_failed_starts += 1
            if self._num_failed_starts == MOST_STARTS:
                start = f"its workers ended {MOST_STARTS} times before they were at a training: "
                causes = {name: start + told(self.jobs[name], error) for name in self.waiting(names)}
                ask(board, "give_up", self.number, causes)


def _in_background(group: Group) -> Future[Exception | None]:
    """Have a group serve in a thread, which does not keep the process from ending: it blocks, and cannot be stopped."""
    future: Future[Exception | None] = Future()

    def serve() -> None:
        try:
            future.set_result(group.serve())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=serve, name=f"group-{group.number}", daemon=True).start()
    return future
