"""What one Ray Train worker does: load, shard, train from the last checkpoint, evaluate, and export on rank 0."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray.train
import ray.train.torch
import torch
from peft import LoraConfig, get_peft_model

from mpo_ray.cluster.deepspeed_engine import CheckpointError, DeepSpeedEngine, prepare_sharded_loading
from mpo_ray.cluster.progress import report
from mpo_ray.cluster.training_job import TrainingJob
from mpo_ray.config_training import PolicyTraining, SupervisedTraining, Training
from mpo_ray.policies.loading import load_model, load_tokenizer
from mpo_ray.run import Run
from mpo_ray.training.completion_model import CompletionModel
from mpo_ray.training.loop import train
from mpo_ray.training.order import num_steps
from mpo_ray.training.preference import Pair, PreferenceLoss, preference_loss
from mpo_ray.training.sft import Example, sft_loss

LOG_EVERY = 10


def train_worker(values: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker. values: `job`, a TrainingJob, and `progress`, a Ray queue."""
    job = TrainingJob.model_validate(values["job"])
    training = job.training
    context = ray.train.get_context()
    torch.set_num_threads(max(1, int(training.workers.cpus_per_worker)))
    run = Run.at(job.run_root)

    sharded = prepare_sharded_loading(training, world_size=context.get_world_size())  # in force while it is referenced
    model = load_trainable(job.model, training, seed=job.seed)
    tokenizer = load_tokenizer(job.model)
    task = (_PreferenceTask if isinstance(training, PolicyTraining) else _SupervisedTask)(run, job, tokenizer)
    total = num_steps(len(task.train), batch_size=training.batch_size, epochs=training.epochs)
    engine = DeepSpeedEngine(CompletionModel(model), training, total_steps=total, device=ray.train.torch.get_device())
    task.engine = engine
    del sharded

    start, history = _restore(engine, job)
    for step, loss in train(
        engine,
        task.loss,
        lengths=np.array([example.num_tokens for example in task.train]),
        batch_size=training.batch_size,
        micro_batch_size=training.micro_batch_size,
        start_step=start,
        total_steps=total,
        seed=job.seed,
    ):
        if step % LOG_EVERY == 0 or step == total:
            mean = float(engine.mean(torch.tensor(loss, dtype=torch.float64)))
            history.append({"step": step, "loss": mean})
            if engine.rank == 0:
                report(values["progress"], job.name, step, total, loss=mean)
        if step % training.checkpoint_every == 0 and step < total:
            evaluated = {f"heldout_{name}": value for name, value in task.evaluate().items()}
            history.append({"step": step, **evaluated})
            _checkpoint(engine, step, history)
    final = task.evaluate()
    _export(engine, run, job, tokenizer, {"inputs": job.inputs, "steps": total, "heldout": final, "history": history})
    _checkpoint(engine, total, history)


class _PreferenceTask:
    """Pairs with their reference log-probabilities, and their loss."""

    engine: DeepSpeedEngine

    def __init__(self, run: Run, job: TrainingJob, tokenizer: Any) -> None:
        assert isinstance(job.training, PolicyTraining)
        self.training, self.pad_id = job.training, tokenizer.pad_token_id
        self.train = [_pair(row) for row in _rows(run, job.train_parts)]
        self.heldout = [_pair(row) for row in _rows(run, job.heldout_parts)]

    def loss(self, examples: np.ndarray) -> torch.Tensor:
        return self._loss([self.train[i] for i in examples]).losses.mean()

    def evaluate(self) -> dict[str, float]:
        """Loss, accuracy and reward margin on the held-out pairs, over all workers."""
        if not self.heldout:
            return {}
        sums = torch.zeros(4, dtype=torch.float64, device=self.engine.device)
        self.engine.model.eval()
        for batch, num_own in _even_batches(len(self.heldout), self.engine, self.training.micro_batch_size):
            with torch.no_grad():
                result = self._loss([self.heldout[i] for i in batch])
            result = type(result)(result.losses[:num_own], result.margins[:num_own])
            sums += result.statistics().to(sums)
        self.engine.model.train()
        loss, accuracy, margin, count = (self.engine.mean(sums) * self.engine.world_size).tolist()
        return {"loss": loss / count, "accuracy": accuracy / count, "margin": margin / count, "num_pairs": count}

    def _loss(self, pairs: list[Pair]) -> PreferenceLoss:
        t = self.training
        return preference_loss(
            self.engine.model,
            pairs,
            loss=t.loss,
            beta=t.beta,
            length_normalized=t.length_normalized,
            pad_id=self.pad_id,
            device=self.engine.device,
        )


class _SupervisedTask:
    """Texts and their negative log-likelihood."""

    engine: DeepSpeedEngine

    def __init__(self, run: Run, job: TrainingJob, tokenizer: Any) -> None:
        assert isinstance(job.training, SupervisedTraining)
        self.training, self.pad_id = job.training, tokenizer.pad_token_id
        self.train = [Example(row["prompt_ids"], row["response_ids"]) for row in _rows(run, job.train_parts)]
        self.heldout = [Example(row["prompt_ids"], row["response_ids"]) for row in _rows(run, job.heldout_parts)]

    def loss(self, examples: np.ndarray) -> torch.Tensor:
        total, num_tokens = self._loss([self.train[i] for i in examples])
        return total / num_tokens

    def evaluate(self) -> dict[str, float]:
        """Mean negative log-likelihood per token of the held-out texts, nats, over all workers."""
        if not self.heldout:
            return {}
        sums = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        self.engine.model.eval()
        for batch, num_own in _even_batches(len(self.heldout), self.engine, self.training.micro_batch_size):
            with torch.no_grad():
                total, num_tokens = self._loss([self.heldout[i] for i in batch[:num_own] or batch])
            if num_own:
                sums += torch.tensor([float(total), num_tokens], dtype=torch.float64, device=sums.device)
        self.engine.model.train()
        total_nll, total_tokens = (self.engine.mean(sums) * self.engine.world_size).tolist()
        return {"loss": total_nll / total_tokens, "num_tokens": total_tokens}

    def _loss(self, examples: list[Example]) -> tuple[torch.Tensor, int]:
        return sft_loss(self.engine.model, examples, pad_id=self.pad_id, device=self.engine.device)


def _even_batches(num_examples: int, engine: DeepSpeedEngine, size: int) -> list[tuple[list[int], int]]:
    """This worker's share in batches, as many on every worker (a sharded forward is a collective).

    Returns (examples, how many of them count); a batch is filled up with example 0 where a worker has none left.
    """
    batches = []
    for start in range(0, num_examples, size * engine.world_size):
        own = list(range(start + engine.rank * size, min(start + (engine.rank + 1) * size, num_examples)))
        batches.append((own or [0], len(own)))
    return batches


def load_trainable(path: str, training: Training, *, seed: int) -> Any:
    """Open the model that a run trains: all its weights, or LoRA adapters whose start the seed alone decides."""
    model: Any = load_model(path, precision=training.precision)
    if training.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if not isinstance(training, PolicyTraining) or training.lora is None:
        return model
    lora = training.lora
    torch.manual_seed(seed)
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        ),
    )


def _rows(run: Run, parts: list[str]) -> list[dict[str, Any]]:
    return [row for part in parts for row in pq.read_table(run.fetch(part)).to_pylist()]


def _pair(row: dict[str, Any]) -> Pair:
    return Pair(
        row["prompt_ids"],
        row["chosen_ids"],
        row["rejected_ids"],
        row["log_ref_chosen"],
        row["log_ref_rejected"],
        row["weight"],
    )


def _restore(engine: DeepSpeedEngine, job: TrainingJob) -> tuple[int, list[dict[str, float]]]:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0, []
    with checkpoint.as_directory() as directory:
        try:
            step = engine.load(Path(directory))
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} Or delete {job.run_root}/{job.directory} to train {job.name!r} again from the start; "
                "everything else in the run is kept."
            ) from error
        return step, json.loads((Path(directory) / "history.json").read_text())


def _checkpoint(engine: DeepSpeedEngine, step: int, history: list[dict[str, float]]) -> None:
    """Every worker saves its part and reports it; Ray Train merges the parts into one checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        engine.save(Path(directory), step=step)
        if engine.rank == 0:
            (Path(directory) / "history.json").write_text(json.dumps(history))
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(directory))


def _export(engine: DeepSpeedEngine, run: Run, job: TrainingJob, tokenizer: Any, record: dict[str, Any]) -> None:
    """Write the trained weights where plain transformers or PEFT load them. Collective; rank 0 writes."""
    state = engine.full_state(trained_only=isinstance(job.training, PolicyTraining) and job.training.lora is not None)
    if engine.rank != 0:
        return
    model = engine.unwrapped
    with run.publishing(job.output) as directory:
        model.save_pretrained(directory, state_dict=state)
        tokenizer.save_pretrained(directory)
        (directory / "training.json").write_text(json.dumps(record, indent=2) + "\n")
