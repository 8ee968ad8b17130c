"""Training runs on Ray Train: one group of workers does them one after another, several groups where there is room.

Starting workers and opening a model takes longer than many a training, so a group stays for as long as there are
trainings for it. A training's result does not depend on what its workers did before.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from rich.console import Console

from mpo_ray.cluster.progress import Bars, bars, report_note
from mpo_ray.cluster.training_board import News, news_of, put_up
from mpo_ray.cluster.training_failure import reason
from mpo_ray.cluster.training_job import TrainingJob
from mpo_ray.cluster.training_room import Outlook, needs, num_free, num_side_by_side, start_of
from mpo_ray.config_training import Workers
from mpo_ray.run import Run, StageError

POLL_S = 0.5
#: How often the trainings are handed out anew where the process that does it dies.
MOST_BOARDS = 3


class TrainingError(StageError):
    """A training run failed more often than `max_failures` allows."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Workers of one kind, which take trainings from the board. number: among all groups; jobs: those of its kind"""

    number: int
    kind: int
    jobs: dict[str, TrainingJob]
    board: Any

    @property
    def workers(self) -> Workers:
        return next(iter(self.jobs.values())).training.workers

    def serve(self) -> None:
        """Do trainings until none is left for this group. Blocks.

        Workers that end with an error are started again, and go on with the training that they were at; it is given up
        once it has failed more often than `max_failures`. They are started afresh after one that ended early, too.
        """
        failures: Counter[str] = Counter()
        while ray.get(self.board.has_work.remote(self.number, self.kind)):
            error = _fit(self)
            if error is None:
                continue
            name = ray.get(self.board.take.remote(self.number, self.kind))
            if name is None:
                return  # the workers had done everything
            failures[name] += 1
            if failures[name] > self.workers.max_failures:
                job = self.jobs[name]
                Run.at(job.run_root).write_text(job.error_log, str(error))
                cause = f"{reason(job, error)} (all of it: {job.run_root}/{job.error_log})"
                ray.get(self.board.end.remote(self.number, cause))


def train_all(jobs: Sequence[TrainingJob], console: Console) -> None:
    """Run every job to its end, as many at a time as the cluster has room for; each resumes from its last checkpoint.

    One that fails is told at once, and the others go on. Raises TrainingError at the end, with the workers' own
    errors. What the other jobs finished stays.
    """
    open_jobs = {job.name: job for job in jobs}
    failed: dict[str, str] = {}
    for left in reversed(range(MOST_BOARDS)):
        try:
            _train_open(open_jobs, failed, console)
            break
        except ray.exceptions.RayActorError as error:
            if not left:
                text = f"the process that hands out trainings died {MOST_BOARDS} times: {error}"
                raise TrainingError(text) from error
            console.print("  the process that hands out trainings died; they go on from their last checkpoints")
    if failed:
        causes = "\n".join(f"  {name}: {cause}" for name, cause in failed.items())
        raise TrainingError(f"training ended early; mended, it goes on from its last checkpoints:\n{causes}")


def _train_open(open_jobs: dict[str, TrainingJob], failed: dict[str, str], console: Console) -> None:
    """Do the open jobs, and take each away that ends; `failed` gets why one ended early.

    Raises RayActorError where the board's process dies, when the trainings at work then have ended.
    """
    jobs = list(open_jobs.values())
    kinds = list(dict.fromkeys(job.training.workers for job in jobs))
    of_kind = [{job.name: job for job in jobs if job.training.workers == workers} for workers in kinds]
    board = put_up({kind: list(own) for kind, own in enumerate(of_kind)})
    room = max(1, min((num_side_by_side(workers) for workers in kinds), default=1))
    notes: dict[str, str] = {}  # what the workers of a training said last; empty while it takes steps
    groups: dict[Future[None], _Group] = {}
    outlooks = [Outlook() for _ in kinds]
    num_groups = 0
    # `fit` blocks, and keeps its workers itself: a thread for each group is all that the driver needs.
    with bars(console) as shown, ThreadPoolExecutor(max_workers=room) as threads:
        while open_jobs or groups:
            news = news_of(board)
            _show(shown, news, notes)
            for name, cause in news.ended:
                del open_jobs[name]
                if cause is not None:
                    failed[name] = cause
                    if open_jobs:
                        others = ", ".join(open_jobs)
                        console.print(f"  {name} failed, and {others} go on: {cause}", markup=False, soft_wrap=True)
            waiting = [
                [name for name in own if name in open_jobs and name not in news.taken.values()] for own in of_kind
            ]
            starting = [group for group in groups.values() if group.number not in news.taken]
            for kind, (own, outlook) in enumerate(zip(of_kind, outlooks, strict=True)):
                if news.taken:
                    outlook.begin()
                for told in news.reports:
                    if told.task in own and not told.note:
                        outlook.hear(told)
                more = _num_more(
                    kinds[kind],
                    len(waiting[kind]),
                    len(groups),
                    starting=bool(starting),
                    room=room,
                    outlook=outlook,
                )
                for _ in range(more):
                    group = _Group(num_groups, kind, own, board)
                    groups[threads.submit(group.serve)] = group
                    num_groups += 1
                    starting.append(group)
            for group in starting:
                if waiting[group.kind]:
                    shown.note(waiting[group.kind].pop(0), start_of(group.workers))
            done, _ = wait(groups, timeout=POLL_S, return_when=FIRST_COMPLETED)
            for future in done:
                del groups[future]
                future.result()
    ray.kill(board)


def _show(shown: Bars, news: News, notes: dict[str, str]) -> None:
    for told in news.reports:
        notes[told.task] = told.note
        if not told.note:
            shown.show(told.task, told.done, told.total, told.figures)
    for name in news.taken.values():
        if note := notes.get(name):
            shown.note(name, note)


def _num_more(workers: Workers, num_waiting: int, groups: int, *, starting: bool, room: int, outlook: Outlook) -> int:
    """How many more groups to start for the trainings of one kind that wait, beside those at work.

    The first waits for its resources. Another is started only where they are free, so that none still waits when
    everything is done, and where it is worth its start; not while one starts: what that takes cannot be seen yet.
    """
    if not groups:
        return min(1, num_waiting)
    if starting or not num_waiting or groups >= room or not outlook.is_worth(num_waiting):
        return 0
    return min(num_waiting, room - groups, num_free(workers))


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer without the process that would hand out Ray Data sets: workers read the run's tables themselves.

    Ray Train starts that process for every group of workers, whether there are data sets or not.
    """

    def _create_default_callbacks(self) -> list[Any]:
        return [one for one in super()._create_default_callbacks() if type(one).__name__ != "DatasetsCallback"]


def _train_on_worker(values: dict[str, Any]) -> None:
    """Load the training's code where it runs: Ray Train's controller, a process for each group, has no use for it."""
    name = ray.get(values["board"].take.remote(values["group"], values["kind"]))
    if name is None:
        return
    report_note(values["board"], name, "loading its libraries")
    from mpo_ray.cluster.train_worker import train_on_worker

    train_on_worker(values)


def _fit(group: _Group) -> Exception | None:
    """Have a group of workers do what the board has for it; returns the error that ended them, if one did.

    Ray Train does not start them again itself: it would count the failures of all their trainings together. The
    checkpoints are the workers' own affair, so it has nothing to keep.
    """
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    workers = group.workers
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _Trainer(
            _train_on_worker,
            train_loop_config={
                "jobs": {name: job.model_dump(mode="json") for name, job in group.jobs.items()},
                "board": group.board,
                "group": group.number,
                "kind": group.kind,
            },
            scaling_config=ScalingConfig(
                num_workers=workers.num_workers,
                use_gpu=workers.gpus_per_worker > 0,
                resources_per_worker=needs(workers),
                placement_strategy="SPREAD" if workers.num_workers > 1 else "PACK",
            ),
            run_config=RunConfig(
                name=f"{next(iter(group.jobs))}-{group.number}",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=2),
            ),
        )
        try:
            trainer.fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            failure: Exception = error
            return failure
    return None
