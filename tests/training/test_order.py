"""The order of examples: every epoch a permutation, the same on every run, shared out whole."""

import numpy as np

from mpo_ray.training.order import batch_indices, micro_batches, num_steps


def test_an_epoch_visits_every_example_once() -> None:
    seen = np.concatenate([batch_indices(s, num_examples=12, batch_size=4, seed=3) for s in range(3)])
    assert sorted(seen) == list(range(12))


def test_batches_run_across_the_end_of_an_epoch() -> None:
    """Two epochs of 10 in batches of 4: 5 steps, every example twice."""
    assert num_steps(10, batch_size=4, epochs=2) == 5
    seen = np.concatenate([batch_indices(s, num_examples=10, batch_size=4, seed=3) for s in range(5)])
    assert sorted(seen) == sorted(2 * list(range(10)))


def test_epochs_differ_and_repeat_with_the_seed() -> None:
    first, second = (batch_indices(s, num_examples=50, batch_size=50, seed=3) for s in (0, 1))
    assert (first != second).any()
    assert (batch_indices(1, num_examples=50, batch_size=50, seed=3) == second).all()
    assert (batch_indices(1, num_examples=50, batch_size=50, seed=4) != second).any()


def test_fewer_examples_than_a_batch_still_make_a_step() -> None:
    assert num_steps(3, batch_size=8, epochs=1) == 1
    assert len(batch_indices(0, num_examples=3, batch_size=8, seed=0)) == 8


def test_workers_share_a_batch_without_overlap_and_like_lengths_go_together() -> None:
    lengths = np.array([9, 1, 8, 2, 7, 3, 6, 4])
    parts = [micro_batches(np.arange(8), lengths, size=2, rank=r, world_size=2) for r in range(2)]
    assert sorted(i for worker in parts for batch in worker for i in batch) == list(range(8))
    assert [sorted(lengths[b]) for worker in parts for b in worker] == [[1, 2], [6, 7], [3, 4], [8, 9]]
