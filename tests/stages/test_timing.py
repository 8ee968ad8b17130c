"""How the speeds of a machine are measured: batches grow as long as there is time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mpo_ray.config_training import PolicyTraining
from mpo_ray.stages import timing
from mpo_ray.stages.timing import Batch, measure_speeds, per_step, per_token, timed
from mpo_ray.training.preference import Pair
from tests.tiny import tiny_llama, tiny_tokenizer


class Clock:
    """Work that takes 1 s and 0.1 s for each row, of 5 tokens."""

    def __init__(self) -> None:
        self.now, self.sizes = 0.0, list[int]()

    def perf_counter(self) -> float:
        return self.now

    def work(self, size: int) -> Batch:
        self.sizes.append(size)
        self.now += 1.0 + 0.1 * size
        return Batch(5 * size, steps=5)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_batches_grow_to_the_size_of_the_stage(clock: Clock) -> None:
    assert per_token(timed(clock.work, 20, box_s=100.0)) == pytest.approx(3.0 / 100)
    assert clock.sizes == [1, 1, 4, 16, 20]


def test_a_batch_that_may_not_end_in_time_is_not_begun(clock: Clock) -> None:
    assert per_token(timed(clock.work, 20, box_s=7.0)) == pytest.approx(1.4 / 20)
    assert clock.sizes == [1, 1, 4]


def test_what_is_counted_elsewhere_is_left_out_but_never_most_of_it() -> None:
    assert per_token([Batch(5, elsewhere=0.5, seconds=1.1)]) == pytest.approx(0.6 / 5)
    assert per_token([Batch(5, elsewhere=5.0, seconds=1.1)]) == pytest.approx(1.1 / 4 / 5)


def test_a_step_of_decoding_has_a_part_that_does_not_grow_with_its_rows(clock: Clock) -> None:
    """5 steps of R rows take 1 + 0.1 R seconds; with a single batch, all of it is the step's."""
    batches = timed(clock.work, 20, box_s=100.0)
    assert per_step(batches) == pytest.approx((0.2, 0.02))
    assert per_step(batches[:1]) == pytest.approx((0.22, 0.0))


def test_every_kind_of_pass_is_timed_on_a_real_model(tmp_path: Path) -> None:
    """Without texts no step that trains all weights is timed, as the policies are adapters."""
    path = str(tiny_llama(tmp_path / "model", tiny_tokenizer(), seed=0))
    pairs = [Pair([1, 7, 8], [9, 2], [10, 2], 0.0, 0.0), Pair([1, 7, 8, 9], [9, 10, 2], [10, 2], 0.0, 0.0)]
    rows = {"scored_rows": 4, "decoded_rows": 8}
    how = {"ends": (2,), "pad_id": 0, "seed": 0, "precision": "fp32", "cpus_per_actor": 1.0}
    speeds = measure_speeds(path, PolicyTraining(), None, pairs, **rows, **how)
    assert all(0 < value < 1 and math.isfinite(value) for value in (speeds.adapt, speeds.forward, speeds.step))
    assert speeds.decode >= 0.0
    assert speeds.train == 0.0
    whole = measure_speeds(path, PolicyTraining(lora=None), None, pairs, **rows, **how)
    assert whole.adapt == 0.0 < whole.train
