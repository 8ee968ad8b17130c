"""The training loop that all kinds of training share: batches in a fixed order on one engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from mpo_ray.training.engine import Engine
from mpo_ray.training.order import batch_indices, micro_batches


def train(
    engine: Engine,
    loss_of: Callable[[np.ndarray], torch.Tensor],
    *,
    lengths: np.ndarray,
    batch_size: int,
    micro_batch_size: int,
    start_step: int,
    total_steps: int,
    seed: int,
) -> Iterator[tuple[int, float]]:
    """Train from `start_step` to `total_steps`; after each optimiser step yield (steps done, this worker's mean loss).

    loss_of: examples of one forward pass → scalar loss, already a mean over them; lengths: (N,) tokens per example.
    """
    engine.model.train()
    for step in range(start_step, total_steps):
        batch = batch_indices(step, num_examples=len(lengths), batch_size=batch_size, seed=seed)
        # Dropout too is a function of seed, step and worker, so that a resumed run repeats it.
        torch.manual_seed(int(np.random.SeedSequence([seed, step, engine.rank]).generate_state(1)[0]))
        total, passes = 0.0, 0
        for examples in micro_batches(
            batch, lengths, size=micro_batch_size, rank=engine.rank, world_size=engine.world_size
        ):
            loss = loss_of(examples)
            engine.backward(loss)
            engine.step()
            total, passes = total + float(loss.detach()), passes + 1
        yield step + 1, total / passes
