"""Work over the files of a run on Ray Data: one file in, one file out, by actors that load their models once.

A file is the unit of work, progress and resume: it is written whole, and one that is there is not made again. What a
part holds depends on its input alone, so that a run that was broken off ends with the same files as an unbroken one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch
from rich.console import Console

from mpo_ray.cluster.progress import bars
from mpo_ray.config import Actors
from mpo_ray.run import Run

#: A worker is made once per actor, by `factory(**arguments)`, and turns one input table into one output table.
Process = Callable[[pa.Table, dict[str, Any]], pa.Table]
Factory = Callable[..., Process]


@dataclass(frozen=True, slots=True)
class Part:
    """One unit of work: nodes of the run, and what else the worker must know of it (JSON values)."""

    source: str
    target: str
    values: dict[str, Any]


def process_parts(
    run: Run,
    parts: Sequence[Part],
    factory: Factory,
    arguments: dict[str, Any],
    *,
    actors: Actors,
    console: Console,
    title: str,
) -> None:
    """Make every part that is not there yet. Raises the worker's own error; parts already written stay."""
    missing = [part for part in parts if not run.exists(part.target)]
    if not missing:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    rows = [{"source": p.source, "target": p.target, "values": p.values} for p in missing]
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _PartWorker,
        fn_constructor_kwargs={"root": run.root, "factory": factory, "arguments": arguments},
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=min(actors.num_actors, len(missing))),
        num_cpus=actors.cpus_per_actor,
        num_gpus=actors.gpus_per_actor or None,
    )
    finished = len(parts) - len(missing)
    with bars(console) as shown:
        shown.show(title, finished, len(parts))
        for _ in done.iter_rows():
            finished += 1
            shown.show(title, finished, len(parts))


class _PartWorker:
    """The actor: fetches a table, calls one function, stores the result."""

    def __init__(self, root: str, factory: Factory, arguments: dict[str, Any]) -> None:
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
        self._run = Run.at(root)
        self._process = factory(**arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for source, target, values in zip(batch["source"], batch["target"], batch["values"], strict=True):
            self._run.write_table(str(target), self._process(self._run.read_table(str(source)), dict(values)))
        return {"target": batch["target"]}
