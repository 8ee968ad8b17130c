"""Progress of work on other machines: what workers report to a board, and bars that show it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mpo_ray.training.pace import SECONDS_LEFT, TOKENS_PER_S
from mpo_ray.waiting import SLOW_S, say

PLAIN_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class Report:
    """How far a task has come: `done` of `total`, and its latest figures; or, in a `note`, what it does meanwhile."""

    task: str
    done: int
    total: int
    figures: dict[str, float]
    note: str = ""


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
        self._notes: dict[str, tuple[str, float]] = {}

    def show(self, task: str, done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
        text = described(figures or {})
        if self._console.is_terminal:
            self._progress.update(self._bar(task), completed=done, total=total, figures=text)
            return
        last_time, last_done = self._printed.get(task, (float("-inf"), -1))
        if done != last_done and (done == total or time.monotonic() - last_time > PLAIN_INTERVAL_S):
            say(f"  {task}: {done}/{total} {text}".rstrip())
            self._printed[task] = (time.monotonic(), done)

    def note(self, task: str, text: str) -> None:
        """Show what a task waits for or does, again and again; a plain line tells it once, if it is not over soon."""
        if self._console.is_terminal:
            self._progress.update(self._bar(task), figures=text)
            return
        last_text, since = self._notes.get(task, ("", 0.0))
        if text != last_text:
            self._notes[task] = (text, time.monotonic())
        elif time.monotonic() - since > SLOW_S:
            say(f"  {task}: {text}")
            self._notes[task] = (text, float("inf"))

    def _bar(self, task: str) -> Any:
        if task not in self._ids:
            self._ids[task] = self._progress.add_task(task, total=None, figures="")
        return self._ids[task]


def described(figures: Mapping[str, float]) -> str:
    """Figures in a line: `loss 0.6931, 1,240 tokens/s, 3 min left`."""
    units = {TOKENS_PER_S: lambda value: f"{value:,.0f} tokens/s", SECONDS_LEFT: lambda value: f"{_time(value)} left"}
    return ", ".join(units[name](value) if name in units else f"{name} {value:.4g}" for name, value in figures.items())


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def bars(console: Console) -> Iterator[Bars]:
    """Show bars while the block runs."""
    shown = Bars(console)
    with shown._progress:
        yield shown
