"""What a Ray Train worker does for each training: load, shard, train from the last checkpoint, evaluate, and export."""

from __future__ import annotations

import gc
import json
import time
import traceback
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train.collective import barrier, broadcast_from_rank_zero

from mpo_ray.cluster.checkpoints import (
    MARK,
    TAG,
    CheckpointError,
    checkpoints,
    new_checkpoint,
    opened_checkpoint,
    read_checkpoint,
)
from mpo_ray.cluster.constrained_task import ConstrainedTask
from mpo_ray.cluster.deepspeed_engine import DeepSpeedEngine, prepare_sharded_loading
from mpo_ray.cluster.event_log import EventLog
from mpo_ray.cluster.tasks import Figures, PreferenceTask, SupervisedTask, Task
from mpo_ray.cluster.trainable import KeptBase, lora_of
from mpo_ray.cluster.training_board import Reporter, ask
from mpo_ray.cluster.training_failure import OPENING, READING, STARTING, memory_sentence
from mpo_ray.cluster.training_job import TrainingJob
from mpo_ray.cluster.training_metrics import TrainingMetrics, flat
from mpo_ray.config_training import ConstrainedTraining, PolicyTraining
from mpo_ray.maths.constrained import RunawayError
from mpo_ray.out_of_memory import OutOfMemoryError, lacking
from mpo_ray.policies.dropout import restore_dropout
from mpo_ray.policies.loading import load_tokenizer
from mpo_ray.run import Run, file_digest
from mpo_ray.training.lagged import TRAINED
from mpo_ray.training.loop import NonFiniteError, train
from mpo_ray.training.multipliers import DegenerateRatioError
from mpo_ray.training.order import num_steps
from mpo_ray.training.pace import Pace

LOG_EVERY = 10
#: Seconds between two reports of the progress, at least.
REPORT_EVERY_S = 1.0
#: What a trained model says of itself: what it was trained from, its figures, and the digests of its other files.
RECORD = "training.json"


def train_on_worker(values: dict[str, Any]) -> None:
    """What Ray Train runs on every worker of a group: the trainings that the board has for it, one after another.

    values: `jobs`, the TrainingJobs of the group by name; `board`, the actor of a TrainingBoard; `group` and `kind`,
    as it knows them
    Ends after a training that ended early: the next ones get workers in which nothing has gone wrong.
    """
    board, group, kind = values["board"], values["group"], values["kind"]
    leads = ray.train.get_context().get_world_rank() == 0
    kept = KeptBase()
    while True:
        name = broadcast_from_rank_zero(ask(board, "take", group, kind) if leads else None)
        if name is None:
            return
        cause = train_worker(TrainingJob.model_validate(values["jobs"][name]), board, kept)
        if leads:
            ask(board, "end", group, name, cause)
        if cause is not None:
            return
        gc.collect()  # an engine and its optimiser refer to each other


def train_worker(job: TrainingJob, board: Any, kept: KeptBase) -> str | None:
    """One training, from its last checkpoint.

    Returns why training stopped where its own figures say that it leads nowhere, None where it came to its end. An
    exception would have it started again from the last checkpoint, to stop at the same step. So would a lack of
    memory, which is told with the setting that lowers the need.
    """
    reporter = Reporter(board, job.name)
    doing = _Doing(reporter)
    try:
        return _train(job, reporter, kept, doing)
    except Exception as error:
        lack = lacking(error)
        if lack is None:
            raise
        told = memory_sentence(job, lack, doing.what)
        if ray.train.get_context().get_world_size() > 1:
            raise OutOfMemoryError(told) from error  # the other workers wait for this one, and have to be ended
        Run.at(job.run_root).write_text(job.error_log, traceback.format_exc())
        return f"{told} (all of it: {job.run_root}/{job.error_log})"


class _Doing:
    """What the worker is at: kept for an error, and told to who waits."""

    def __init__(self, reporter: Reporter) -> None:
        self.what, self._reporter = "", reporter

    def begin(self, what: str) -> None:
        self.what = what
        self._reporter.note(what)


def _train(job: TrainingJob, reporter: Reporter, kept: KeptBase, doing: _Doing) -> str | None:
    training = job.training
    context = ray.train.get_context()
    torch.set_num_threads(max(1, int(training.workers.cpus_per_worker)))
    run = Run.at(job.run_root)

    doing.begin(OPENING)
    sharded = prepare_sharded_loading(training, world_size=context.get_world_size())  # in force while it is referenced
    model = kept.completion_model(job.model, training, seed=job.seed)
    tokenizer = load_tokenizer(job.model)
    doing.begin(READING)
    task = _task(run, job, tokenizer)
    total = num_steps(len(task.lengths), batch_size=training.batch_size, epochs=training.epochs)
    doing.begin(STARTING)
    engine = DeepSpeedEngine(model, training, total_steps=total, device=ray.train.torch.get_device())
    del sharded

    task.begin(engine)
    start, history = _restore(engine, task, run, job, reporter)
    pace = Pace(
        start=start,
        total=total,
        tokens_per_step=training.batch_size * float(task.lengths.mean()),
        now=time.monotonic(),
    )
    display = _Display(run, job, reporter, pace, start=start, total=total) if engine.rank == 0 else None
    doing.begin("at its first step")
    try:
        for step, loss in train(
            engine,
            task.loss,
            lengths=task.lengths,
            units=task.units,
            name_of=task.name,
            batch_size=training.batch_size,
            micro_batch_size=training.micro_batch_size,
            start_step=start,
            total_steps=total,
            seed=job.seed,
        ):
            task.stepped(step)
            doing.what = f"at step {step + 1}"
            mean = {"loss": float(engine.mean(torch.tensor(loss, dtype=torch.float64)))}
            if step % LOG_EVERY == 0 or step == total:
                figures = {**mean, **task.figures()}
                history.append({"step": step, **flat(figures)})
                if display is not None:
                    display.show(step, figures)
            if display is not None:
                display.progress(step, mean)
            if step % training.checkpoint_every == 0 and step < total:
                evaluated = {f"heldout_{name}": value for name, value in task.evaluate().items()}
                history.append({"step": step, **evaluated})
                if display is not None:
                    display.events.add(step, evaluated)
                _checkpoint(engine, task, run, job, step, history)
    except (RunawayError, DegenerateRatioError, NonFiniteError) as error:
        return str(error)
    finally:
        if display is not None:
            display.events.close()
    doing.begin("looking at the held-out examples")
    final = task.evaluate()
    doing.begin("writing the model")
    _export(engine, run, job, tokenizer, {"inputs": job.inputs, "steps": total, "heldout": final, "history": history})
    _checkpoint(engine, task, run, job, total, history)
    engine.close()
    kept.take_back(model, training)
    return None


class _Display:
    """Where the figures of a training are seen while it runs: the cluster's metrics, TensorBoard, the progress line."""

    def __init__(self, run: Run, job: TrainingJob, reporter: Reporter, pace: Pace, *, start: int, total: int) -> None:
        self.metrics, self.events = TrainingMetrics(job), EventLog(run, job.name, start=start)
        self._reporter, self._pace, self._total = reporter, pace, total
        self._figures: dict[str, float] = {}
        self._reported = float("-inf")

    def show(self, step: int, figures: Figures) -> None:
        self.metrics.show(figures)
        self._figures = flat(figures)
        self.events.add(step, self._figures)

    def progress(self, step: int, loss: dict[str, float]) -> None:
        """Report a step, unless one was reported a moment ago; beside its loss, the other figures as last shown."""
        now = time.monotonic()
        pace = self._pace.after(step, now)
        if step == self._total or now - self._reported >= REPORT_EVERY_S:
            self._reporter.steps(step, self._total, **{**self._figures, **loss, **pace})
            self._reported = now


def _task(run: Run, job: TrainingJob, tokenizer: Any) -> Task:
    if isinstance(job.training, ConstrainedTraining):
        return ConstrainedTask.of_job(run, job, tokenizer)
    return (PreferenceTask if isinstance(job.training, PolicyTraining) else SupervisedTask)(run, job, tokenizer)


def _restore(
    engine: DeepSpeedEngine, task: Task, run: Run, job: TrainingJob, reporter: Reporter
) -> tuple[int, list[dict[str, float]]]:
    """The step and history of the newest checkpoint that every worker finds whole, loaded. Rank 0 says which there are.

    One that is passed over is told of.
    """
    names = broadcast_from_rank_zero(checkpoints(run, job) if engine.rank == 0 else None)
    problem: CheckpointError | None = None  # of the newest
    for name in reversed(names):
        leads = ray.train.get_context().get_local_rank() == 0
        with opened_checkpoint(run, job, name, leads=leads, barrier=barrier) as directory:
            found = _history(engine, directory)
            if isinstance(found, CheckpointError):
                problem = problem or found
                continue
            step = _load(engine, task, directory, job)
        if problem is not None and engine.rank == 0:
            reporter.remark(f"{problem} It goes on from the one before, of step {step}.")
        return step, found
    if problem is not None:
        raise CheckpointError(f"{problem} {_remedy(job)}")
    return 0, []


def _history(engine: DeepSpeedEngine, directory: Path) -> list[dict[str, float]] | CheckpointError:
    """A checkpoint's history, or why it cannot be gone on from. All workers agree which of the two. Collective."""
    found: list[dict[str, float]] | CheckpointError
    try:
        found = read_checkpoint(directory, world_size=engine.world_size)
    except CheckpointError as error:
        found = error
    num_failed = engine.mean(torch.tensor(float(isinstance(found, CheckpointError))))
    if num_failed > 0 and not isinstance(found, CheckpointError):
        return CheckpointError(f"another worker finds the checkpoint {directory.name} damaged.")
    return found


def _load(engine: DeepSpeedEngine, task: Task, directory: Path, job: TrainingJob) -> int:
    try:
        step = engine.load(directory)
        task.load(directory / TAG)
    except (ValueError, FileNotFoundError) as error:
        text = f"the checkpoint {directory.name} cannot be loaded: {error}. {_remedy(job)}"
        raise CheckpointError(text) from error
    except CheckpointError as error:
        raise CheckpointError(f"{error} {_remedy(job)}") from error
    return step


def _remedy(job: TrainingJob) -> str:
    return (
        f"Delete {job.run_root}/{job.directory} to train {job.name!r} again from the start; everything else in the run "
        "is kept."
    )


def _checkpoint(
    engine: DeepSpeedEngine, task: Task, run: Run, job: TrainingJob, step: int, history: list[dict[str, float]]
) -> None:
    """Every worker saves its part. Collective."""
    with new_checkpoint(run, job, step, rank=engine.rank, barrier=barrier) as directory:
        (directory / TAG).mkdir()
        task.save(directory / TAG)
        engine.save(directory, step=step)
        if engine.rank == 0:
            (directory / MARK).write_text(json.dumps(history))


def _export(engine: DeepSpeedEngine, run: Run, job: TrainingJob, tokenizer: Any, record: dict[str, Any]) -> None:
    """Write the trained weights where plain transformers or PEFT load them. Collective; rank 0 writes."""
    adapted = lora_of(job.training) is not None
    state = engine.full_state(trained_only=adapted)
    if engine.rank != 0:
        return
    model = engine.unwrapped
    if adapted:
        layout = model.peft_config[TRAINED]
        layout.target_modules = sorted(layout.target_modules)  # PEFT writes a set in another order in each process
    else:
        restore_dropout(model.config, job.model)
    with run.publishing(job.output, mark=RECORD) as directory:
        model.save_pretrained(directory, state_dict=state, **({"selected_adapters": [TRAINED]} if adapted else {}))
        tokenizer.save_pretrained(directory)
        files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
        record["files"] = {
            str(path.relative_to(directory)): [path.stat().st_size, file_digest(str(path))] for path in files
        }
        (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
