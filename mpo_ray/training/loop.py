"""The training loop that all kinds of training share: batches in a fixed order on one engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from mpo_ray.training.engine import Engine
from mpo_ray.training.order import batch_indices, micro_batches

#: How many rows the error about a loss that is not finite names.
NUM_NAMED = 8


class NonFiniteError(RuntimeError):
    """Training has met a loss or a gradient that is not finite. The message has the step and its rows."""


def train(
    engine: Engine,
    loss_of: Callable[[np.ndarray], torch.Tensor],
    *,
    lengths: np.ndarray,
    units: np.ndarray,
    batch_size: int,
    micro_batch_size: int,
    start_step: int,
    total_steps: int,
    seed: int,
    name_of: Callable[[int], str] = "example {}".format,
) -> Iterator[tuple[int, float]]:
    """Train from `start_step` to `total_steps`; after each optimiser step yield (steps done, loss).

    loss_of: examples of one forward pass → the sum of their losses, a scalar with gradient
    lengths: (N,) tokens per example; units: (N,) what an example counts in the mean over a step: its learned tokens
        where the loss is one per token, 1 where it is one per example; name_of: example → its name in a message

    A step's gradient is that of Σ losses / Σ units over the whole step, so it depends neither on the size of a forward
    pass nor on the number of workers. The yielded losses of all workers have the step's loss as their mean.
    Raises NonFiniteError, on every worker at the same step.
    """
    engine.model.train()
    passes = batch_size // micro_batch_size  # of all workers: what the engine divides by
    for step in range(start_step, total_steps):
        batch = batch_indices(step, num_examples=len(lengths), batch_size=batch_size, seed=seed)
        # Dropout too is a function of seed, step and worker, so that a resumed run repeats it.
        torch.manual_seed(int(np.random.SeedSequence([seed, step, engine.rank]).generate_state(1)[0]))
        num_units = float(units[batch].sum())
        total = 0.0
        bad: list[int] = []
        for examples in micro_batches(
            batch, lengths, size=micro_batch_size, rank=engine.rank, world_size=engine.world_size
        ):
            loss = loss_of(examples)
            value = float(loss.detach())
            total += value
            if not math.isfinite(value):
                bad += examples.tolist()
                loss = loss * math.nan  # the gradient as well, so that all workers find it in the norm that they share
            engine.backward(loss * (passes / num_units))
            engine.step()
        if not math.isfinite(engine.gradient_norm()):
            raise NonFiniteError(_reason(engine, step + 1, batch, bad, name_of))
        yield step + 1, total * engine.world_size / num_units


def _reason(engine: Engine, step: int, batch: np.ndarray, bad: list[int], name_of: Callable[[int], str]) -> str:
    """The same sentence on every worker. Collective."""
    found = engine.mean(torch.as_tensor(np.isin(batch, bad), dtype=torch.float64)).cpu().numpy() > 0
    what = "the loss" if found.any() else "the gradient's norm"
    rows = np.unique(batch[found] if found.any() else batch).tolist()
    named = ", ".join(map(name_of, rows[:NUM_NAMED])) + (
        f" and {len(rows) - NUM_NAMED} more" if rows[NUM_NAMED:] else ""
    )
    where = "in the forward pass of" if found.any() else "after the rows"
    return (
        f"step {step}: {what} is not finite {where} {named}. Look at these rows and at the model's weights; if both "
        "are sound, lower the learning rate, or train in fp32."
    )
