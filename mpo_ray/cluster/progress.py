"""Progress of work on other machines: what workers report through a Ray queue, and bars that show it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ray.util.queue import Queue
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class Report:
    """How far a task has come: `done` of `total`, and its latest figures."""

    task: str
    done: int
    total: int
    figures: dict[str, float]


def reports_of(queue: Queue) -> list[Report]:
    """What has been reported to a queue since it was last asked."""
    waiting = queue.qsize()
    return [Report(*values) for values in queue.get_nowait_batch(waiting)] if waiting else []


def report(queue: Queue, task: str, done: int, total: int, **figures: float) -> None:
    """Report from a worker, without waiting. Plain values, so that the queue's process needs none of our modules."""
    queue.actor.put_nowait.remote((task, done, total, figures))


class Bars:
    """Progress bars on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._console = console
        self._ids: dict[str, Any] = {}
        self._printed: dict[str, tuple[float, int]] = {}

    def show(self, task: str, done: int, total: int, figures: dict[str, float] | None = None) -> None:
        text = " ".join(f"{key} {value:.4g}" for key, value in (figures or {}).items())
        if self._console.is_terminal:
            if task not in self._ids:
                self._ids[task] = self._progress.add_task(task, total=total, figures="")
            self._progress.update(self._ids[task], completed=done, total=total, figures=text)
            return
        last_time, last_done = self._printed.get(task, (0.0, -1))
        if done != last_done and (done == total or time.monotonic() - last_time > PLAIN_INTERVAL_S):
            print(f"  {task}: {done}/{total} {text}".rstrip(), file=sys.stderr, flush=True)
            self._printed[task] = (time.monotonic(), done)


@contextlib.contextmanager
def bars(console: Console) -> Iterator[Bars]:
    """Show bars while the block runs."""
    shown = Bars(console)
    with shown._progress:
        yield shown
