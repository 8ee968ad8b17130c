"""Which examples an optimiser step sees: a function of seed and step alone, so that a resumed run repeats it."""

from __future__ import annotations

import numpy as np


def num_steps(num_examples: int, *, batch_size: int, epochs: int) -> int:
    """Optimiser steps in `epochs` passes; a last batch that is not full is left out, but there is always one step."""
    return max(1, num_examples * epochs // batch_size)


def batch_indices(step: int, *, num_examples: int, batch_size: int, seed: int) -> np.ndarray:
    """Examples of optimiser step `step` (from 0): the epochs' shuffles laid end to end, cut every `batch_size`."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(positions // num_examples):
        shuffle = np.random.default_rng([seed, int(epoch)]).permutation(num_examples)
        here = positions // num_examples == epoch
        indices[here] = shuffle[positions[here] % num_examples]
    return indices


def micro_batches(batch: np.ndarray, lengths: np.ndarray, *, size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """This worker's forward passes of one step: examples of like length together, which saves padding.

    batch: (B,) examples; lengths: (N,) tokens of every example. The order inside a step does not change its gradient.
    """
    by_length = batch[np.argsort(lengths[batch], kind="stable")]
    return [by_length[i : i + size] for i in range(rank * size, len(batch), size * world_size)]
