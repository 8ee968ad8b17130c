"""Training runs on Ray Train: one group of workers does them one after another, several groups where there is room.

Starting workers and opening a model takes longer than many a training, so a group stays for as long as there are
trainings for it. A training's result does not depend on what its workers did before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait

import ray
import ray.exceptions
from rich.console import Console

from mpo_ray.cluster.progress import Bars, bars
from mpo_ray.cluster.training_board import News, news_of, put_up
from mpo_ray.cluster.training_job import TrainingJob
from mpo_ray.cluster.training_kind import Kind
from mpo_ray.cluster.training_room import start_of
from mpo_ray.config_training import Workers
from mpo_ray.run import StageError

POLL_S = 0.5
#: How often the trainings are handed out anew where the process that does it dies.
MOST_BOARDS = 3


class TrainingError(StageError):
    """A training run failed more often than `max_failures` allows."""


def train_all(jobs: Sequence[TrainingJob], console: Console) -> None:
    """Run every job to its end, as many at a time as the cluster has room for; each resumes from its last checkpoint.

    One that fails is told at once, and the others go on. Raises TrainingError at the end, with the workers' own
    errors. What the other jobs finished stays.
    """
    open_jobs = {job.name: job for job in jobs}
    failed: dict[str, str] = {}
    for left in reversed(range(MOST_BOARDS)):
        kinds = _kinds(open_jobs.values())
        try:
            _train_open(kinds, open_jobs, failed, console)
            break
        except ray.exceptions.RayActorError as error:
            wait([future for kind in kinds for future in kind.at_work])  # each ends at its next step
            if not left:
                text = f"the process that hands out trainings died {MOST_BOARDS} times: {error}{_causes(failed)}"
                raise TrainingError(text) from error
            console.print("  the process that hands out trainings died; they go on from their last checkpoints")
    if failed:
        raise TrainingError(f"training ended early; mended, it goes on from its last checkpoints:{_causes(failed)}")


def _causes(failed: dict[str, str]) -> str:
    return "".join(f"\n  {name}: {cause}" for name, cause in failed.items())


def _train_open(
    kinds: Sequence[Kind], open_jobs: dict[str, TrainingJob], failed: dict[str, str], console: Console
) -> None:
    """Do the open jobs, and take each away that ends; `failed` gets why one ended early.

    Raises RayActorError where the board's process dies. After any error the board is gone, and the groups that are at
    work find that at their next step, and end.
    """
    board = put_up({kind.number: list(kind.jobs) for kind in kinds})
    notes: dict[str, str] = {}  # what the workers of a training said last; empty while it takes steps
    numbers = itertools.count()
    num_remarks = 0
    try:
        with bars(console) as shown:
            while open_jobs or any(kind.is_at_work for kind in kinds):
                news = news_of(board)
                _show(shown, news, notes)
                for name, text in news.remarks[num_remarks:]:
                    console.print(f"  {name}: {text}", markup=False, soft_wrap=True)
                num_remarks = len(news.remarks)
                _take_away(news, open_jobs, failed, console)
                for kind in kinds:
                    kind.hear(news)
                for kind in kinds:
                    waiting = kind.waiting(open_jobs)
                    for _ in range(kind.num_more(len(waiting), _starting(kinds))):
                        kind.start(next(numbers), board)
                    for name, _ in zip(waiting, kind.starting, strict=False):
                        shown.note(name, start_of(kind.workers))
                wait([future for kind in kinds for future in kind.groups], POLL_S, FIRST_COMPLETED)
                for kind in kinds:
                    kind.collect(board, open_jobs)
    finally:
        ray.kill(board)


def _kinds(jobs: Iterable[TrainingJob]) -> list[Kind]:
    """The jobs by the workers that they need."""
    of_kind: dict[str, dict[str, TrainingJob]] = {}
    for job in jobs:
        of_kind.setdefault(job.training.workers.model_dump_json(), {})[job.name] = job
    return [Kind(number, own) for number, own in enumerate(of_kind.values())]


def _starting(kinds: Iterable[Kind]) -> list[Workers]:
    """What the groups of all kinds need that start."""
    return [kind.workers for kind in kinds for _ in kind.starting]


def _take_away(news: News, open_jobs: dict[str, TrainingJob], failed: dict[str, str], console: Console) -> None:
    """Take away the jobs that have ended, and tell of one that ended early while others go on."""
    for name, cause in news.ended:
        if open_jobs.pop(name, None) is None or cause is None:
            continue
        failed[name] = cause
        if open_jobs:
            others = ", ".join(open_jobs)
            console.print(f"  {name} failed, and {others} go on: {cause}", markup=False, soft_wrap=True)


def _show(shown: Bars, news: News, notes: dict[str, str]) -> None:
    for told in news.reports:
        notes[told.task] = told.note
        if not told.note:
            shown.show(told.task, told.done, told.total, told.figures)
    for name in news.taken.values():
        if note := notes.get(name):
            shown.note(name, note)
