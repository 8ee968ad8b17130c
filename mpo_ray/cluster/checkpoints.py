"""The checkpoints of a training: how they are kept, whether one is whole, and which one a training goes on from.

Every worker brings its own files to a checkpoint's directory. A mark, which comes last, says that all are there.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mpo_ray.cluster.training_job import CHECKPOINTS, TrainingJob
from mpo_ray.run import Run, file_digest
from mpo_ray.whole_files import PARTIAL

#: Directory of a checkpoint that holds DeepSpeed's files and the task's.
TAG = "state"
#: File of a checkpoint that vouches for the others: the training's history so far.
MARK = "history.json"
#: How a checkpoint's name begins, and that of one which Ray Train wrote for an earlier version, without a mark.
PREFIX, OF_RAY_TRAIN = "checkpoint_step_", "checkpoint_2"
NUM_KEPT = 2


class CheckpointError(RuntimeError):
    """A training checkpoint is missing a file or is damaged."""


def check_checkpoint(directory: Path, *, world_size: int) -> None:
    """Compare every worker's files with the digests it wrote. Raises CheckpointError naming the file."""
    for rank in range(world_size):
        listing = directory / f"digests-{rank}.json"
        if not listing.exists():
            raise CheckpointError(
                f"the checkpoint {directory} has no part of worker {rank}: it was written by fewer than {world_size} "
                "workers or is incomplete. Train with the number of workers that wrote it."
            )
        try:
            digests = json.loads(listing.read_text())
        except ValueError as error:
            raise CheckpointError(f"the checkpoint {directory} is damaged: {listing.name}: {error}.") from error
        for name, expected in digests.items():
            path = directory / TAG / name
            if not path.exists() or file_digest(str(path)) != expected:
                size = f"{os.path.getsize(path)} bytes" if path.exists() else "missing"
                raise CheckpointError(
                    f"the checkpoint {directory} is damaged: {path.name} ({size}) is not what was written."
                )


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


def checkpoints(run: Run, job: TrainingJob) -> list[str]:
    """Names of the checkpoints that are finished, the newest last. Those of Ray Train are older than ours.

    One of Ray Train's has no mark that came last, so it counts if it is whole.
    """
    nodes = [node.removeprefix(f"{job.directory}/") for node in run.files(job.directory)]
    ours = sorted(name for name, _, file in (node.partition("/") for node in nodes) if file == MARK)
    old = [name for name in ours if name.startswith(OF_RAY_TRAIN) and _is_whole(run, job, name)]
    return old + [name for name in ours if name.startswith(PREFIX)]


def newest_checkpoint(run: Run, job: TrainingJob) -> str | None:
    """Node of the checkpoint that a training goes on from, None where it has none."""
    return f"{job.directory}/{found[-1]}" if (found := checkpoints(run, job)) else None


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


def _is_whole(run: Run, job: TrainingJob, name: str) -> bool:
    try:
        check_checkpoint(run.fetch(f"{job.directory}/{name}"), world_size=job.training.workers.num_workers)
    except CheckpointError:
        return False  # it was being written
    return True
