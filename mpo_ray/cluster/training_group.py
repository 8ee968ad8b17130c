"""A group of Ray Train workers, which does trainings one after another for as long as the board has some for it."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from dataclasses import dataclass
from typing import Any

import ray.exceptions
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from mpo_ray.cluster.training_board import Reporter, ask
from mpo_ray.cluster.training_failure import found_no_room, reason
from mpo_ray.cluster.training_job import TrainingJob
from mpo_ray.cluster.training_room import needs
from mpo_ray.config_training import Workers
from mpo_ray.run import Run


@dataclass(frozen=True, slots=True)
class Group:
    """Workers of one kind, which take trainings from the board. number: among all groups; jobs: those of its kind"""

    number: int
    kind: int
    jobs: dict[str, TrainingJob]
    board: Any

    @property
    def workers(self) -> Workers:
        return next(iter(self.jobs.values())).training.workers

    def serve(self) -> Exception | None:
        """Do trainings until none is left for this group. Blocks. Raises RayActorError where the board has died.

        Workers that end with an error are started again, and go on with the training that they were at; it is given up
        once it has failed more often than `max_failures`. They are started afresh after one that ended early, too. To
        wait for resources, as others of the cluster do, is no failure.
        Returns an error that ended them while they held no training, and so is the fault of none.
        """
        failures: Counter[str] = Counter()
        while ask(self.board, "has_work", self.number, self.kind):
            error = fit(self)
            if error is None:
                continue
            name = ask(self.board, "at", self.number)
            if name is None:
                return error
            if found_no_room(error):
                continue
            failures[name] += 1
            if failures[name] > self.workers.max_failures:
                ask(self.board, "end", self.number, name, told(self.jobs[name], error))
        return None


def told(job: TrainingJob, error: Exception) -> str:
    """Why Ray Train gave a training up, in a sentence; all of the error is written into the run."""
    Run.at(job.run_root).write_text(job.error_log, str(error))
    return f"{reason(job, error)} (all of it: {job.run_root}/{job.error_log})"


class Trainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer without the process that would hand out Ray Data sets: workers read the run's tables themselves.

    Ray Train starts that process for every group of workers, whether there are data sets or not.
    """

    def _create_default_callbacks(self) -> list[Any]:
        return [one for one in super()._create_default_callbacks() if type(one).__name__ != "DatasetsCallback"]


def train_on_worker(values: dict[str, Any]) -> None:
    """Load the training's code where it runs: Ray Train's controller, a process for each group, has no use for it."""
    name = ask(values["board"], "take", values["group"], values["kind"])
    if name is None:
        return
    Reporter(values["board"], name).note("loading its libraries")
    from mpo_ray.cluster import train_worker

    train_worker.train_on_worker(values)


def fit(group: Group) -> Exception | None:
    """Have a group of workers do what the board has for it; returns the error that ended them, if one did.

    Ray Train does not start them again itself: it would count the failures of all their trainings together. The
    checkpoints are the workers' own affair, so it has nothing to keep.
    """
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    workers = group.workers
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            train_on_worker,
            train_loop_config={
                "jobs": {name: job.model_dump(mode="json") for name, job in group.jobs.items()},
                "board": group.board,
                "group": group.number,
                "kind": group.kind,
            },
            scaling_config=ScalingConfig(
                num_workers=workers.num_workers,
                use_gpu=workers.gpus_per_worker > 0,
                resources_per_worker=needs(workers),
                placement_strategy="SPREAD" if workers.num_workers > 1 else "PACK",
            ),
            run_config=RunConfig(
                name=f"{next(iter(group.jobs))}-{group.number}",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=2),
            ),
        )
        try:
            trainer.fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            failure: Exception = error
            return failure
    return None
