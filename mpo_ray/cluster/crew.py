"""Ray actors that live through many rounds of work: their models are loaded once, not once a round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from mpo_ray.cluster.parts import Factory, Process, scoring_remedy
from mpo_ray.config import Actors
from mpo_ray.out_of_memory import memory_told
from mpo_ray.run import Run, StageError

#: How often Ray starts an actor again whose process or node died; what it was doing is done again.
MAX_RESTARTS = 4


@dataclass(frozen=True, slots=True)
class Task:
    """One file to make: its node, the digest of what it is made from, and what the worker gets."""

    target: str
    inputs: str
    table: pa.Table
    values: Mapping[str, Any]


class Crew:
    """Actors that each hold one worker, `factory(**arguments)`. None is started before there is work.

    Work goes to actors as they become ready, so that one that finds no place yet holds nothing up.
    """

    def __init__(self, run: Run, factory: Factory, arguments: Mapping[str, Any], actors: Actors) -> None:
        self._run, self._factory, self._arguments, self._actors = run, factory, dict(arguments), actors
        self._hired: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []

    def make(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """Make every file that is not there from the same inputs; yields each task when its file is there.

        Raises the worker's own error, or StageError where an actor died too often; files already written stay.
        """
        queue = []
        for task in tasks:
            if self._run.exists(task.target) and self._run.inputs_of(task.target) == task.inputs:
                yield task
            else:
                queue.append(task)
        self._hire(len(queue))
        busy: dict[Any, tuple[Any, Task]] = {}
        while queue or busy:
            while queue and self._idle:
                actor, task = self._idle.pop(), queue.pop(0)
                busy[actor.make.remote(task)] = (actor, task)
            [ready], _ = ray.wait([*busy, *(self._starting if queue else ())], num_returns=1)
            if ready in self._starting:
                _result(ready)
                self._idle.append(self._starting.pop(ready))
                continue
            actor, task = busy.pop(ready)
            _result(ready)
            self._idle.append(actor)
            yield task

    def dismiss(self) -> None:
        """End the actors, whatever they are doing."""
        for actor in self._hired:
            ray.kill(actor)
        self._hired, self._starting, self._idle = [], {}, []

    def _hire(self, num_tasks: int) -> None:
        actor_class = ray.remote(
            num_cpus=self._actors.cpus_per_actor,
            num_gpus=self._actors.gpus_per_actor or None,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )(_Worker)
        while len(self._hired) < min(self._actors.num_actors, num_tasks):
            remedy = scoring_remedy(self._actors)
            actor = actor_class.remote(self._run.root, self._factory, self._arguments, remedy)
            self._hired.append(actor)
            self._starting[actor.load.remote()] = actor


class _Worker:
    """The actor: makes one table from another by its process, and stores the result."""

    def __init__(self, root: str, factory: Factory, arguments: dict[str, Any], remedy: str) -> None:
        """remedy: what to do where memory is not enough"""
        self._root, self._factory, self._arguments = root, factory, arguments
        self._memory = "decoded fit", remedy
        self._process: Process | None = None

    def load(self) -> None:
        """Load the models, outside of the constructor, so that an error arrives as what it is."""
        if self._process is None:
            torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
            with memory_told(*self._memory):
                self._process = self._factory(**self._arguments)

    def make(self, task: Task) -> None:
        self.load()  # again, where the actor was started again
        assert self._process is not None
        with memory_told(*self._memory):
            made = self._process(task.table, dict(task.values))
        Run.at(self._root).write_table(task.target, made, inputs=task.inputs)


def _result(reference: Any) -> None:
    """Wait for a call to end; raise its own error rather than Ray's."""
    try:
        ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None
    except RayActorError as error:
        raise StageError(
            f"an actor died more than {MAX_RESTARTS} times, for want of memory perhaps: {error}. Finished files stay; "
            "the same command goes on from there. Fewer scoring.num_actors or a smaller scoring.batch_size need less."
        ) from error
