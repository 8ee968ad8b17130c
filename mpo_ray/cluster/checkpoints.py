"""The files of a training checkpoint: whether they are whole, and which checkpoint a training goes on from.

Ray Train writes `checkpoint_manager_snapshot.json`, its record of the checkpoints, in place: a process that is killed
meanwhile leaves a part of it, and Ray Train then refuses to begin.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from mpo_ray.cluster.training_job import CHECKPOINTS, TrainingJob
from mpo_ray.run import Run, file_digest

SNAPSHOT = "checkpoint_manager_snapshot.json"
#: Directory of a checkpoint that holds DeepSpeed's files and the task's.
TAG = "state"


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


def checkpoint_to_resume(run: Run, job: TrainingJob) -> str | None:
    """The newest whole checkpoint where Ray Train cannot say so itself; None where it can, or where there is none.

    Ray Train's damaged record is removed: it begins a new one.
    """
    snapshot = f"{job.directory}/{SNAPSHOT}"
    content = run.read_bytes(snapshot)
    names = sorted({node.removeprefix(f"{job.directory}/").split("/")[0] for node in run.files(job.directory)})
    if content is None or _is_usable(content, names):
        return None
    run.remove(snapshot)
    for name in reversed([name for name in names if name.startswith("checkpoint_") and name != SNAPSHOT]):
        node = f"{job.directory}/{name}"
        try:
            check_checkpoint(run.fetch(node), world_size=job.training.workers.num_workers)
        except CheckpointError:
            continue  # it was being written
        return f"{run.root}/{node}"
    return None


def remove_checkpoints(run: Run, directory: str) -> None:
    """Remove a training's checkpoints, Ray Train's record of them first: a kill then leaves nothing to go on from."""
    if not run.exists(directory):
        return
    run.still_ours()
    run.remove(f"{directory}/{SNAPSHOT}")
    run.remove(directory)
    run.remove_empty(CHECKPOINTS)


def _is_usable(content: bytes, names: list[str]) -> bool:
    """Whether Ray Train can read its record, and every checkpoint that it names is there."""
    try:
        recorded = [str(result["checkpoint_dir_name"]) for result in json.loads(content)["checkpoint_results"]]
    except (ValueError, KeyError, TypeError):
        return False
    return {os.path.basename(name) for name in recorded} <= set(names)
