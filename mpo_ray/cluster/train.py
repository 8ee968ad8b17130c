"""Training runs on Ray Train: side by side where the cluster has room for it, one after another where it has not."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue
from rich.console import Console

from mpo_ray.cluster.checkpoints import checkpoint_to_resume
from mpo_ray.cluster.progress import bars, report_note, reports_of
from mpo_ray.cluster.training_failure import reason
from mpo_ray.cluster.training_job import TrainingJob
from mpo_ray.config_training import Workers
from mpo_ray.run import Run, StageError

POLL_S = 0.5


class TrainingError(StageError):
    """A training run failed more often than `max_failures` allows."""


def train_all(jobs: Sequence[TrainingJob], console: Console) -> None:
    """Run every job to its end, as many at a time as the cluster has room for; each resumes from its last checkpoint.

    One that fails is told at once; its workers are gone, and what they held serves the others, which go on.
    Raises TrainingError at the end, with the workers' own errors. What the other jobs finished stays.
    """
    progress = Queue(actor_options={"num_cpus": 0})
    failed: dict[str, str] = {}
    room = max(1, min((num_side_by_side(job.training.workers) for job in jobs), default=1))
    # `fit` blocks, and keeps its workers itself: a thread for each run is all that the driver needs.
    with bars(console) as shown, ThreadPoolExecutor(max_workers=room) as threads:
        running = {threads.submit(_fit, job, progress): job for job in jobs}
        notes: dict[str, str] = {}  # what the workers of a training said last; empty while it takes steps
        while running:
            done, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
            for report in reports_of(progress):
                notes[report.task] = report.note
                if not report.note:
                    shown.show(report.task, report.done, report.total, report.figures)
            for job in (job for future, job in running.items() if future.running()):
                if note := notes[job.name] if job.name in notes else start_of(job.training.workers):
                    shown.note(job.name, note)
            for future in done:
                job = running.pop(future)
                error = future.result()
                if error is not None:
                    failed[job.name] = error
                    if running:
                        others = ", ".join(other.name for other in running.values())
                        console.print(f"  {job.name} failed, and {others} go on: {error}", markup=False, soft_wrap=True)
    progress.shutdown()
    if failed:
        causes = "\n".join(f"  {name}: {cause}" for name, cause in failed.items())
        raise TrainingError(f"training ended early; mended, it goes on from its last checkpoints:\n{causes}")


def start_of(workers: Workers) -> str:
    """What a training waits for that has not said anything yet: resources, or the start of its workers."""
    one = {"CPU": workers.cpus_per_worker, "GPU": workers.gpus_per_worker}
    wanted = {kind: amount for kind, amount in one.items() if amount > 0}
    groups = ray.util.placement_group_table().values()
    if not any(g["state"] == "PENDING" and wanted in map(dict, g["bundles"].values()) for g in groups):
        return "starting its worker" if workers.num_workers == 1 else f"starting its {workers.num_workers} workers"
    total, free = ray.cluster_resources(), ray.available_resources()
    need = [
        f"{amount * workers.num_workers:g} {kind} ({free.get(kind, 0.0):g} of {total.get(kind, 0.0):g} free)"
        for kind, amount in wanted.items()
    ]
    return f"waiting for {' and '.join(need)}"


def num_side_by_side(workers: Workers) -> int:
    """How many groups of these workers the cluster holds at once, by its total of CPUs and GPUs."""
    total = ray.cluster_resources()
    need = {"CPU": workers.cpus_per_worker, "GPU": workers.gpus_per_worker}
    return min(
        math.floor(float(total.get(kind, 0.0)) / (amount * workers.num_workers) + 1e-9)
        for kind, amount in need.items()
        if amount > 0
    )


def _train_on_worker(values: dict[str, Any]) -> str | None:
    """Load the training's code where it runs: Ray Train's controller, a process for each run, has no use for it."""
    report_note(values["progress"], values["job"]["name"], "loading its libraries")
    from mpo_ray.cluster.train_worker import train_worker

    return train_worker(values)


def _fit(job: TrainingJob, progress: Queue) -> str | None:
    """Run one TorchTrainer; returns its error, or why it stopped, as text, None if it ended well."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    workers = job.training.workers
    resources = {"CPU": workers.cpus_per_worker}
    if workers.gpus_per_worker:
        resources["GPU"] = workers.gpus_per_worker
    resume = checkpoint_to_resume(Run.at(job.run_root), job)
    trainer = TorchTrainer(
        _train_on_worker,
        train_loop_config={"job": job.model_dump(mode="json"), "progress": progress, "resume": resume},
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=workers.gpus_per_worker > 0,
            resources_per_worker=resources,
            placement_strategy="SPREAD" if workers.num_workers > 1 else "PACK",
        ),
        run_config=RunConfig(
            name=job.run_name,
            storage_path=f"{job.run_root}/training",
            failure_config=FailureConfig(max_failures=workers.max_failures, controller_failure_limit=2),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        stopped: str | None = trainer.fit().return_value
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        Run.at(job.run_root).write_text(job.error_log, str(error))
        return f"{reason(job, error)} (all of it: {job.run_root}/{job.error_log})"
    return stopped
