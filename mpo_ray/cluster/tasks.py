"""What a worker does with its examples, per kind of training: their loss, and the figures of the held-out ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from mpo_ray.cluster.deepspeed_engine import DeepSpeedEngine
from mpo_ray.cluster.training_job import TrainingJob
from mpo_ray.config_training import PolicyTraining, SupervisedTraining
from mpo_ray.run import Run
from mpo_ray.training.preference import Pair, PreferenceLoss, preference_loss
from mpo_ray.training.sft import Example, sft_loss

#: By quantity: a number, or one for each objective.
Figures = Mapping[str, float | Mapping[str, float]]


class Sized(Protocol):
    """A training example of any kind."""

    @property
    def num_tokens(self) -> int: ...


class Task(Protocol):
    """One kind of training. A task that carries no state of its own from step to step keeps the empty methods."""

    train: Sequence[Sized]
    engine: DeepSpeedEngine

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of every training example."""
        return np.array([example.num_tokens for example in self.train])

    @property
    def units(self) -> np.ndarray:
        """(N,) what every training example counts in the mean over a step."""
        return np.ones(len(self.train))

    def name(self, example: int) -> str:
        """A training example in a message."""
        return f"training example {example + 1}"

    def begin(self, engine: DeepSpeedEngine) -> None:
        """Take the engine. Its weights are still those of the beginning, even where a checkpoint will replace them."""
        self.engine = engine

    def loss(self, examples: np.ndarray) -> torch.Tensor:
        """The sum of the losses of some training examples, a scalar with gradient."""

    def evaluate(self) -> dict[str, float]:
        """Figures of the held-out examples, over all workers; empty where there are none."""

    def stepped(self, step: int) -> None:
        """Follow the `step`-th optimiser step, from 1. On every worker."""
        return

    def figures(self) -> Figures:
        """What to show beside the loss."""
        return {}

    def save(self, directory: Path) -> None:
        """Write this worker's part of the task's own state into a directory of the checkpoint."""
        return

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote."""
        return


class PreferenceTask(Task):
    """Pairs with their reference log-probabilities, and their loss."""

    def __init__(self, run: Run, job: TrainingJob, tokenizer: Any) -> None:
        assert isinstance(job.training, PolicyTraining)
        self.training, self.pad_id = job.training, tokenizer.pad_token_id
        rows = rows_of(run, job.train_parts)
        self.train, self._ids = [_pair(row) for row in rows], [row["id"] for row in rows]
        self.heldout = [_pair(row) for row in rows_of(run, job.heldout_parts)]

    def name(self, example: int) -> str:
        return f"pair {self._ids[example]!r}"

    def loss(self, examples: np.ndarray) -> torch.Tensor:
        return self._loss([self.train[i] for i in examples]).losses.sum()

    def evaluate(self) -> dict[str, float]:
        """Loss, accuracy and reward margin on the held-out pairs, over all workers."""
        if not self.heldout:
            return {}
        sums = torch.zeros(4, dtype=torch.float64, device=self.engine.device)
        self.engine.model.eval()
        for batch, num_own in even_batches(len(self.heldout), self.engine, self.training.micro_batch_size):
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


class SupervisedTask(Task):
    """Texts and their negative log-likelihood."""

    train: list[Example]

    def __init__(self, run: Run, job: TrainingJob, tokenizer: Any) -> None:
        assert isinstance(job.training, SupervisedTraining)
        self.training, self.pad_id, self._tokenizer = job.training, tokenizer.pad_token_id, tokenizer
        self.train = [Example(row["prompt_ids"], row["response_ids"]) for row in rows_of(run, job.train_parts)]
        self.heldout = [Example(row["prompt_ids"], row["response_ids"]) for row in rows_of(run, job.heldout_parts)]

    def name(self, example: int) -> str:
        found = self.train[example]
        text = self._tokenizer.decode([*found.prompt_ids, *found.response_ids])
        return f"the text {text if len(text) <= 60 else text[:59] + '…'!r}"

    @property
    def units(self) -> np.ndarray:
        return np.array([len(example.response_ids) for example in self.train])

    def loss(self, examples: np.ndarray) -> torch.Tensor:
        return self._loss([self.train[i] for i in examples])[0]

    def evaluate(self) -> dict[str, float]:
        """Mean negative log-likelihood per token of the held-out texts, nats, over all workers."""
        if not self.heldout:
            return {}
        sums = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        self.engine.model.eval()
        for batch, num_own in even_batches(len(self.heldout), self.engine, self.training.micro_batch_size):
            with torch.no_grad():
                total, num_tokens = self._loss([self.heldout[i] for i in batch[:num_own] or batch])
            if num_own:
                sums += torch.tensor([float(total), num_tokens], dtype=torch.float64, device=sums.device)
        self.engine.model.train()
        total_nll, total_tokens = (self.engine.mean(sums) * self.engine.world_size).tolist()
        return {"loss": total_nll / total_tokens, "num_tokens": total_tokens}

    def _loss(self, examples: list[Example]) -> tuple[torch.Tensor, int]:
        return sft_loss(self.engine.model, examples, pad_id=self.pad_id, device=self.engine.device)


def even_batches(num_examples: int, engine: DeepSpeedEngine, size: int) -> list[tuple[list[int], int]]:
    """This worker's share in batches, as many on every worker (a sharded forward is a collective).

    Returns (examples, how many of them count); a batch is filled up with example 0 where a worker has none left.
    """
    batches = []
    for start in range(0, num_examples, size * engine.world_size):
        own = list(range(start + engine.rank * size, min(start + (engine.rank + 1) * size, num_examples)))
        batches.append((own or [0], len(own)))
    return batches


def rows_of(run: Run, parts: list[str]) -> list[dict[str, Any]]:
    return [row for part in parts for row in run.read_table(part).to_pylist()]


def _pair(row: dict[str, Any]) -> Pair:
    return Pair(
        row["prompt_ids"],
        row["chosen_ids"],
        row["rejected_ids"],
        row["log_ref_chosen"],
        row["log_ref_rejected"],
        row["weight"],
    )
