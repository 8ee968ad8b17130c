"""Progress of work on other machines: an actor that workers report to, and a driver that shows what it holds."""

from __future__ import annotations

import contextlib
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_INTERVAL_S = 10.0


class _Board:
    """The actor: task → (steps done, steps in all, latest figures)."""

    def __init__(self) -> None:
        self._tasks: dict[str, tuple[int, int, dict[str, float]]] = {}

    def update(self, task: str, done: int, total: int, figures: dict[str, float]) -> None:
        self._tasks[task] = (done, total, figures)

    def read(self) -> dict[str, tuple[int, int, dict[str, float]]]:
        return self._tasks


class ProgressBoard:
    """A handle on the actor, for the driver that made it and for workers that know its name."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self._actor = actor

    @classmethod
    def create(cls) -> ProgressBoard:
        name = f"mpo_ray-progress-{uuid.uuid4().hex[:8]}"
        return cls(name, ray.remote(num_cpus=0)(_Board).options(name=name, namespace="mpo_ray").remote())

    @classmethod
    def find(cls, name: str) -> ProgressBoard | None:
        """The board of this name, None if its driver is gone."""
        try:
            return cls(name, ray.get_actor(name, namespace="mpo_ray"))
        except ValueError:
            return None

    def update(self, task: str, done: int, total: int, **figures: float) -> None:
        self._actor.update.remote(task, done, total, figures)

    def read(self) -> dict[str, tuple[int, int, dict[str, float]]]:
        values: dict[str, tuple[int, int, dict[str, float]]] = ray.get(self._actor.read.remote())
        return values


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
