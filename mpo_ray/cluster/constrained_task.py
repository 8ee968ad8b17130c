"""MOPO on a worker (design 2.4): candidates, the statistics of a step over all workers, and what follows from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpo_ray.cluster.deepspeed_engine import DeepSpeedEngine
from mpo_ray.cluster.lagged_weights import LaggedWeights
from mpo_ray.cluster.tasks import Figures, Task, even_batches, rows_of
from mpo_ray.cluster.training_job import TrainingJob
from mpo_ray.config_training import ConstrainedTraining
from mpo_ray.maths.constrained import ratio
from mpo_ray.maths.simplex import Array
from mpo_ray.run import Run
from mpo_ray.training.constrained import (
    Candidates,
    Problem,
    Statistics,
    cloning_loss,
    policy_statistics,
    pool_of,
    statistics,
    token_batch,
)
from mpo_ray.training.lagged import keeps_lagged
from mpo_ray.training.multipliers import Multipliers, check_ratio

STATE = "multipliers.json"


class ConstrainedTask(Task):
    """Weighted cloning, offline with the ratio that the candidates bring, or online with the one that λ gives."""

    def __init__(
        self,
        training: ConstrainedTraining,
        problem: Problem,
        train: Sequence[Candidates],
        heldout: Sequence[Candidates],
        *,
        pad_id: int,
    ) -> None:
        self.training, self.problem, self.pad_id = training, problem, pad_id
        self.train, self.heldout = train, heldout
        self.state = Multipliers.start(problem)
        self._seen: list[Array] = []
        self._ids: list[str] = []

    @classmethod
    def of_job(cls, run: Run, job: TrainingJob, tokenizer: Any) -> ConstrainedTask:
        """Read the job's candidates. Raises ValueError for a job without a problem, or a row that is none."""
        if not isinstance(job.training, ConstrainedTraining) or job.problem is None:
            raise ValueError(f"the job {job.name!r} has no `problem`, so nothing says what is maximised and bounded.")
        size = len(job.problem.secondary)
        rows = [rows_of(run, parts) for parts in (job.train_parts, job.heldout_parts)]
        train, heldout = ([Candidates.of_row(row, num_secondary=size) for row in side] for side in rows)
        task = cls(job.training, job.problem, train, heldout, pad_id=tokenizer.pad_token_id)
        task._ids = [row["prompt_id"] for row in rows[0]]
        return task

    def name(self, example: int) -> str:
        return f"prompt {self._ids[example]}" if self._ids else super().name(example)

    def begin(self, engine: DeepSpeedEngine) -> None:
        """The weights are still π_ref's: its log-probabilities are taken now, and no model is kept for them."""
        super().begin(engine)
        self._reference = self._log_probabilities(self.heldout)
        self._lagged = None
        if keeps_lagged(self.training):
            self._lagged = LaggedWeights(engine)
            self._train_reference = self._log_probabilities(self.train)

    def loss(self, examples: np.ndarray) -> torch.Tensor:
        batch = [self.train[i] for i in examples]
        tokens = token_batch(batch, pad_id=self.pad_id).to(self.engine.device)
        first = pool = pool_of(batch)
        if self._lagged is not None:
            with torch.no_grad():
                lagged = self.engine.model(tokens, weights="lagged")
            reference = np.concatenate([self._train_reference[i] for i in examples])
            pool = pool_of(batch, lagged.double().cpu().numpy() - reference)
        if self.training.method == "online":
            rho = ratio(pool, self.state.multipliers, self.problem.tau)
        else:
            rho = np.concatenate([candidates.ratio for candidates in batch])
        self._seen.append(statistics(pool, rho, first, self.state.log_chi).as_array())
        return len(batch) * cloning_loss(self.engine.model(tokens), pool, rho)

    def stepped(self, step: int) -> None:
        """Average over the workers, then move λ, χ, bounds and the lagged policy alike on each.

        Raises RunawayError and DegenerateRatioError, on every worker at the same step.
        """
        found = self._over_workers(np.mean(self._seen, axis=0))
        self._seen = []
        if self.training.values_of == "policy":
            found = replace(self._over_workers(self._of_policy(step)), effective_share=found.effective_share)
        if self.training.method == "online":
            self.state = self.state.after(found, self.problem, self.training, step=step)
        else:
            self.state = self.state.observe(found, found.values, step=step, lag=None)
        check_ratio(self.state, step=step, least=self.training.least_effective_share)
        if self._lagged is not None and self.training.lag is not None and step % self.training.lag == 0:
            self._lagged.turn()

    def figures(self) -> Figures:
        """Averages over the last steps; `multiplier` and `chi` as they are, where they move."""
        state = self.state
        if state.averages is None:
            return {}
        arrays = {"value": state.values, "bound": state.bounds, "slack": state.values - state.bounds}
        if self.training.method == "online":
            arrays["multiplier"] = state.multipliers
            if self.problem.radius > 0:
                arrays["chi"] = np.exp(state.log_chi)
        named = {key: self._named(array) for key, array in arrays.items()}
        primary, share, kl = state.averages[:3].tolist()
        return {"primary": primary, "effective_share": share, "kl": kl, **named}

    def evaluate(self) -> dict[str, float]:
        """What the policy itself reaches on the held-out candidates, each weighed by π_ψ/π_ref, self-normalised.

        primary and value_*: E[p̄] and E[q̄]; slack_*: over the bounds in force; effective_share, and kl to the reference,
        nats: between distributions over a prompt's candidates
        """
        if not self.heldout:
            return {}
        log_ratios = np.concatenate(self._log_probabilities(self.heldout)) - np.concatenate(self._reference)
        found = policy_statistics(self.heldout, log_ratios, self.state.log_chi)
        slack = found.values - self.state.bounds
        return {
            "primary": found.primary,
            **{f"value_{name}": value for name, value in self._named(found.values).items()},
            **{f"slack_{name}": value for name, value in self._named(slack).items()},
            "effective_share": found.effective_share,
            "kl": found.kl,
            "num_prompts": float(len(self.heldout)),
        }

    def save(self, directory: Path) -> None:
        if self.engine.rank == 0:
            (directory / STATE).write_text(json.dumps(self.state.as_json()))
        if self._lagged is not None:
            self._lagged.save(directory)

    def load(self, directory: Path) -> None:
        self.state = Multipliers.of_json(json.loads((directory / STATE).read_text()))
        if self._lagged is not None:
            self._lagged.load(directory)

    def _of_policy(self, step: int) -> Array:
        """What the policy has on this worker's next `micro_batch_size` held-out prompts, after the `step`-th step."""
        size = self.training.micro_batch_size
        first = ((step - 1) * self.engine.world_size + self.engine.rank) * size
        places = [(first + i) % len(self.heldout) for i in range(size)]
        batch = [self.heldout[i] for i in places]
        self.engine.model.eval()
        log_ratios = self._fixed(batch) - np.concatenate([self._reference[i] for i in places])
        self.engine.model.train()
        return policy_statistics(batch, log_ratios, self.state.log_chi).as_array()

    def _over_workers(self, mine: Array) -> Statistics:
        return Statistics.of_array(self.engine.mean(torch.as_tensor(mine)).cpu().numpy())

    def _named(self, values: Array) -> dict[str, float]:
        return dict(zip(self.problem.secondary, values.tolist(), strict=True))

    def _log_probabilities(self, examples: Sequence[Candidates]) -> list[Array]:
        """log π_ψ of every candidate, (m,) nats per example, worked out in shares and known on every worker."""
        if not examples:
            return []
        starts = np.cumsum([0, *(len(c.response_ids) for c in examples)])
        found = torch.zeros(int(starts[-1]), dtype=torch.float64, device=self.engine.device)
        self.engine.model.eval()
        for batch, num_own in even_batches(len(examples), self.engine, self.training.micro_batch_size):
            logprobs = self._fixed([examples[i] for i in batch])
            if num_own:
                found[int(starts[batch[0]]) : int(starts[batch[-1] + 1])] = torch.as_tensor(logprobs)
        self.engine.model.train()
        total = (self.engine.mean(found) * self.engine.world_size).cpu().numpy()
        return np.split(total, starts[1:-1])

    @torch.no_grad()
    def _fixed(self, batch: Sequence[Candidates]) -> Array:
        """log π_ψ of every candidate of a batch, (N,) nats."""
        tokens = token_batch(batch, pad_id=self.pad_id).to(self.engine.device)
        logprobs: Array = self.engine.model(tokens).double().cpu().numpy()
        return logprobs
