"""Work over the files of a run on Ray Data: one file in, one file out, by actors that load their models once.

A file is the unit of work, progress and resume. It is written whole, and records the digest of what it was made from:
one that is there with the same digest is not made again. What a part holds depends on its inputs alone, so that a run
that was broken off, or changed and changed back, ends with the same files as one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch
from rich.console import Console

from mpo_ray.cluster.progress import bars
from mpo_ray.config import Actors
from mpo_ray.out_of_memory import OutOfMemoryError, memory_told
from mpo_ray.run import Run, StageError
from mpo_ray.storage import INPUTS
from mpo_ray.waiting import told_if_slow

#: A worker is made once per actor, by `factory(**arguments)`, and turns one input table into one output table.
Process = Callable[[pa.Table, dict[str, Any]], pa.Table]
Factory = Callable[..., Process]

#: Where a part's dead processes are counted, and how many there may be.
DEATHS, MOST_DEATHS = "deaths", 4

#: Footers that are read at once: on remote storage each is a round trip.
NUM_READERS = 16


@dataclass(frozen=True, slots=True)
class Part:
    """One unit of work: nodes of the run, what the target is made from, and what else the worker must know.

    inputs: digest of everything that the target's content depends on
    values: JSON values for the worker
    columns: for a table that is made column by column, the digest of each such column's inputs, in their order.
        Columns that an older target has from the same inputs are handed to the worker with the source.
    """

    source: str
    target: str
    inputs: str
    values: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)


def process_parts(
    run: Run,
    parts: Sequence[Part],
    factory: Factory,
    arguments: dict[str, Any],
    *,
    actors: Actors,
    console: Console,
    title: str,
    remedy: str = "",
) -> None:
    """Make every part that is not there yet from the same inputs. `parts` is all that their directories shall hold.

    An actor whose process or node dies is started again, and makes the part that it was at from the start: that is Ray
    Data's default for pools of actors, without a limit. Here a part at which processes died `MOST_DEATHS` times ends
    the stage: what a kernel kills for want of memory would die for ever. Raises the worker's own error, StageError;
    parts already written stay.
    remedy: what to do where memory is not enough; if absent, about the run's scoring actors
    """
    missing = _missing(run, parts)
    finished = len(parts) - len(missing)
    if finished:
        console.print(f"[dim]  {title}: {finished} of {len(parts)} parts are there already[/dim]")
    if not missing:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    run.remove(DEATHS)
    rows = [{"part": json.dumps(asdict(part))} for part in missing]
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _PartWorker,
        fn_constructor_kwargs={
            "root": run.root,
            "factory": factory,
            "arguments": arguments,
            "memory": (title, remedy or scoring_remedy(actors)),
        },
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=min(actors.num_actors, len(missing))),
        num_cpus=actors.cpus_per_actor,
        num_gpus=actors.gpus_per_actor or None,
    )
    try:
        _show(done.iter_rows(), title, finished, len(parts), actors, console)
    except (OutOfMemoryError, StageError) as error:  # with a traceback of Ray's around it, and advice of Ray Data's
        kind = OutOfMemoryError if isinstance(error, OutOfMemoryError) else StageError
        raise kind(str(getattr(error, "cause", error)).splitlines()[0]) from None
    run.remove(DEATHS)  # of processes that died at a part which others then made


def _show(rows: Iterable[Any], title: str, finished: int, total: int, actors: Actors, console: Console) -> None:
    """Have the parts made, and show how many there are. rows: one for each part that is made"""
    size = min(actors.num_actors, total - finished)
    with bars(console) as shown:
        shown.show(title, finished, total)
        made = iter(rows)
        with told_if_slow(f"  {title}: starting {size} actor{'s' * (size > 1)}, which open their models first"):
            first = next(made)
        for _ in chain([first], made):
            finished += 1
            shown.show(title, finished, total)


def _missing(run: Run, parts: Sequence[Part]) -> list[Part]:
    """The parts that are not there from the same inputs. Files of their directories that no part wants are removed."""
    wanted = {part.target: part for part in parts}
    present = [node for directory in {target.rpartition("/")[0] for target in wanted} for node in run.parts(directory)]
    for node in present:
        if node not in wanted:
            run.remove(node)
    kept = [node for node in present if node in wanted]
    with ThreadPoolExecutor(NUM_READERS) as readers:
        recorded = dict(zip(kept, readers.map(run.inputs_of, kept), strict=True))
    return [part for part in parts if recorded.get(part.target) != part.inputs]


def scoring_remedy(actors: Actors) -> str:
    """The settings of the run file that lower what an actor needs."""
    smaller = [f"lower scoring.batch_size (now {actors.batch_size})"] if actors.batch_size > 1 else []
    if actors.prompts_per_part > 1:
        smaller.append(f"lower scoring.prompts_per_part (now {actors.prompts_per_part})")
    if actors.num_actors > 1:
        smaller.append(f"lower scoring.num_actors (now {actors.num_actors})")
    if actors.precision != "bf16":
        smaller.append("set scoring.precision: bf16")
    text = ", or ".join(smaller) or "use a machine with more memory"
    return f"{text[0].upper()}{text[1:]}."


def _deaths(part: Part) -> str:
    return f"{DEATHS}/{part.target}.json"


class _PartWorker:
    """The actor: fetches a table, calls one function, stores the result."""

    def __init__(self, root: str, factory: Factory, arguments: dict[str, Any], memory: tuple[str, str]) -> None:
        """memory: what the work is, and what to do where memory is not enough for it"""
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
        self._run = Run.at(root)
        self._factory, self._arguments, self._memory = factory, arguments, memory
        self._process: Process | None = None
        self._restarted = ray.get_runtime_context().was_current_actor_reconstructed

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        parts = [Part(**json.loads(str(text))) for text in batch["part"]]
        for part in parts:
            self._count_deaths(part)
        with memory_told(*self._memory):
            if self._process is None:  # outside of the constructor, so that an error arrives as what it is
                self._process = self._factory(**self._arguments)
        for part in parts:
            table = self._run.read_table(part.source)
            for name, column in self._columns_at_hand(part).items():
                table = table.append_column(name, column)
            with memory_told(*self._memory):
                made = in_order(self._process(table, dict(part.values)), part.columns)
            self._run.write_table(part.target, made, inputs=part.inputs)
            if self._restarted:
                self._run.remove(_deaths(part))
        return {"target": [part.target for part in parts]}

    def _count_deaths(self, part: Part) -> None:
        """Note that this part is begun again by a process in the place of one that died. Raises StageError."""
        if not self._restarted:
            return
        deaths = (self._run.read_json(_deaths(part)) or 0) + 1
        if deaths >= MOST_DEATHS:
            title, remedy = self._memory
            raise StageError(
                f"{title}: {deaths} processes died at {part.target}, as when the system has no memory left (signal 9). "
                f"{remedy} Finished files stay; the same command goes on from there."
            )
        self._run.write_json(_deaths(part), deaths)

    def _columns_at_hand(self, part: Part) -> dict[str, pa.ChunkedArray]:
        """Columns of the target as it is now that were made from the inputs they shall be made from."""
        if not part.columns or not self._run.exists(part.target):
            return {}
        old = self._run.read_table(part.target)
        recorded = {column.name: (column.metadata or {}).get(INPUTS) for column in old.schema}
        return {name: old[name] for name, inputs in part.columns.items() if recorded.get(name) == inputs.encode()}


def in_order(table: pa.Table, columns: Mapping[str, str]) -> pa.Table:
    """A table whose columns `columns` come last, in their order, each with the digest of its inputs."""
    others = [name for name in table.column_names if name not in columns]
    ordered = table.select([*others, *columns])
    marked = [
        f.with_metadata({INPUTS: columns[f.name].encode()}) if f.name in columns else f.remove_metadata()
        for f in ordered.schema
    ]
    return ordered.cast(pa.schema(marked))
