"""The checkpoints of a training: how they are kept, which there are, and whether one is whole.

Every worker brings its own files to a checkpoint's directory. A mark, which comes last, says that all are there.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mpo_ray.cluster.training_job import CHECKPOINTS, TrainingJob
from mpo_ray.records import digest
from mpo_ray.run import Run, file_digest
from mpo_ray.whole_files import PARTIAL

#: Directory of a checkpoint that holds DeepSpeed's files and the task's.
TAG = "state"
#: File of a checkpoint that vouches for the others: the training's history so far.
MARK = "history.json"
#: How a checkpoint's name begins. Those that Ray Train wrote for an earlier version, `checkpoint_2026-…`, sort before.
PREFIX = "checkpoint_step_"
NUM_KEPT = 2


class CheckpointError(RuntimeError):
    """A training checkpoint is missing a file or is damaged."""


def read_checkpoint(directory: Path, *, world_size: int) -> list[dict[str, float]]:
    """Compare every worker's files with the digests it wrote; returns the history so far.

    Raises CheckpointError naming the file.
    """
    what = f"the checkpoint {directory.name}"
    for rank in range(world_size):
        listing = directory / f"digests-{rank}.json"
        if not listing.exists():
            raise CheckpointError(
                f"{what} has no part of worker {rank}: it was written by fewer than {world_size} "
                "workers or is incomplete. Train with the number of workers that wrote it."
            )
        try:
            digests = json.loads(listing.read_text())
        except ValueError as error:
            raise CheckpointError(f"{what} is damaged: {listing.name}: {error}.") from error
        for name, expected in digests.items():
            path = directory / TAG / name
            if not path.exists() or file_digest(str(path)) != expected:
                size = f"{os.path.getsize(path)} bytes" if path.exists() else "missing"
                raise CheckpointError(f"{what} is damaged: {path.name} ({size}) is not what was written.")
    try:
        history: list[dict[str, float]] = json.loads((directory / MARK).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{what} is damaged: {MARK}: {error}.") from error
    return history


@contextmanager
def new_checkpoint(run: Run, job: TrainingJob, step: int, *, rank: int, barrier: Callable[[], None]) -> Iterator[Path]:
    """Give every worker an empty directory on its machine; what they leave there becomes one checkpoint of the run.

    Rank 0 leaves the mark among its files. Older checkpoints than the last two are removed. Collective.
    """
    node = f"{job.directory}/{PREFIX}{step:08d}"
    if rank == 0:
        run.remove(f"{node}/{MARK}")  # of one that was begun, or found damaged, before
        run.remove(node)
    barrier()
    run.local.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=run.local) as scratch:
        yield Path(scratch)
        files = {str(path.relative_to(scratch)): path for path in Path(scratch).rglob("*") if path.is_file()}
        mark = files.pop(MARK, None)
        for name, path in sorted(files.items()):
            run.put_file(f"{node}/{name}", path)
        barrier()
        if mark is not None:
            run.put_file(f"{node}/{MARK}", mark)
            for name in checkpoints(run, job)[:-NUM_KEPT]:
                run.remove(f"{job.directory}/{name}/{MARK}")
                run.remove(f"{job.directory}/{name}")


@contextmanager
def opened_checkpoint(
    run: Run, job: TrainingJob, name: str, *, leads: bool, barrier: Callable[[], None]
) -> Iterator[Path]:
    """Give every worker the directory of a checkpoint. Of object storage, a machine has one copy until the block ends.

    leads: whether this worker makes and removes the copy, as one on each machine does. Collective.
    """
    node = f"{job.directory}/{name}"
    if run.is_local:
        yield run.local / node
        return
    place = run.local / f"{PARTIAL}{digest(node)[:16]}"
    try:
        if leads:
            shutil.rmtree(place, ignore_errors=True)  # of one that was killed
            run.download(node, place / name)
        barrier()
        yield place / name
        barrier()
    finally:
        if leads:
            shutil.rmtree(place, ignore_errors=True)


def checkpoints(run: Run, job: TrainingJob) -> list[str]:
    """Names of the checkpoints that are finished, the newest last."""
    nodes = [node.removeprefix(f"{job.directory}/") for node in run.files(job.directory)]
    return sorted(name for name, _, file in (node.partition("/") for node in nodes) if file == MARK)


def remove_checkpoints(run: Run, directory: str) -> None:
    """Remove a training's checkpoints, their marks first: a kill then leaves nothing to go on from."""
    if not run.exists(directory):
        return
    run.still_ours()
    for node in run.files(directory):
        if node.endswith(f"/{MARK}"):
            run.remove(node)
    run.remove(directory)
    run.remove_empty(CHECKPOINTS)
