"""Prediction before decoding: expectations under π_λ from samples, against sums over every response."""

from __future__ import annotations

import numpy as np
import pytest

from mpo_ray.maths.prediction import predict, win_values
from mpo_ray.maths.sample_table import SampleTable, log_proposal
from mpo_ray.maths.statistics import win_probabilities
from tests.world import Array, World


def sampled(worlds: list[World], each: int, rng: np.random.Generator) -> tuple[SampleTable, Array, Array]:
    """`each` responses of the reference and of every policy for each world; the table, their lengths, who drew them."""
    ratios, lengths, by_reference = [], [], []
    for world in worlds:
        models = [world.log_reference, *world.log_policies.T]
        rows = np.concatenate([rng.choice(len(world.responses), size=each, p=np.exp(m)) for m in models])
        ratios.append(world.log_ratios[rows])
        lengths += [float(len(world.responses[row])) for row in rows]
        by_reference += [True] * each + [False] * (each * 3)
    table = np.concatenate(ratios)
    share = log_proposal(np.hstack([np.zeros((len(table), 1)), table]), np.full((len(table), 4), float(each)))
    starts = np.arange(len(worlds) + 1, dtype=np.int64) * 4 * each
    return SampleTable(table, share, starts), np.array(lengths), np.array(by_reference)


def test_predictions_tend_to_the_sums_over_every_response() -> None:
    """E_{π_λ}[length] and KL(π_λ‖π_ref) = Σ_y π_λ (log π_λ − log π_ref), for several λ from the same samples."""
    worlds = [World.random(seed, spread=1.5) for seed in range(6)]
    table, lengths, _ = sampled(worlds, 4000, np.random.default_rng(0))
    points = np.array([[1.0, 0.0, 0.0], [0.2, 0.5, 0.3], [0.0, 0.4, 0.6]])
    found = predict(table, points, lengths[:, None], draws=50, confidence=0.9, rng=np.random.default_rng(1))
    for point, prediction in zip(points, found, strict=True):
        exact = [np.exp(w.log_mixture(point)) for w in worlds]
        length = np.mean([p @ [len(y) for y in w.responses] for p, w in zip(exact, worlds, strict=True)])
        kl = np.mean([p @ (w.log_mixture(point) - w.log_reference) for p, w in zip(exact, worlds, strict=True)])
        assert prediction.values[0, 0] == pytest.approx(length, abs=0.02)
        assert prediction.kl[0] == pytest.approx(kl, abs=0.02)
        assert prediction.values[0, 1] < prediction.values[0, 0] < prediction.values[0, 2]
        assert 1.0 <= prediction.effective_sample_size <= 16_000


def test_the_intervals_are_those_of_the_prompts_not_of_the_samples() -> None:
    """Prompts alike leave no interval; prompts that differ do."""
    world = World.random(0)
    rows = np.tile(world.log_ratios, (5, 1))
    starts = np.arange(6, dtype=np.int64) * len(world.responses)
    table = SampleTable(rows, np.zeros(len(rows)), starts)
    values = np.tile(np.arange(len(world.responses), dtype=float), 5)[:, None]
    weights = np.array([[0.3, 0.3, 0.4]])
    same = predict(table, weights, values, draws=100, confidence=0.9, rng=np.random.default_rng(0))[0]
    np.testing.assert_allclose(same.values[0], same.values[0, 0])
    shifted = values + np.repeat(np.arange(5.0), len(world.responses))[:, None]
    other = predict(table, weights, shifted, draws=100, confidence=0.9, rng=np.random.default_rng(0))[0]
    assert other.values[0, 2] - other.values[0, 1] > 1.0
    without = predict(table, weights, values, draws=0, confidence=0.9, rng=np.random.default_rng(0))[0]
    assert np.isnan(without.values[0, 1:]).all()


@pytest.mark.parametrize("numbers", [[6, 6, 6], [4, 7, 5]])
def test_a_response_is_compared_with_the_references_others(numbers: list[int]) -> None:
    """W(y) = mean over π_ref's responses y' ≠ y of 1[r > r'] + ½ 1[=]; ties happen here."""
    rng = np.random.default_rng(0)
    starts = np.cumsum([0, *numbers])
    rewards = rng.integers(0, 4, size=(int(starts[-1]), 2)).astype(float)
    by_reference = np.concatenate([np.arange(n) < 3 for n in numbers])
    found = win_values(rewards, by_reference, starts)
    for p, start in enumerate(starts[:-1]):
        for row in range(start, starts[p + 1]):
            others = [r for r in range(start, start + 3) if r != row]
            for k in range(2):
                expected = win_probabilities(rewards[[row], k][None], rewards[others, k][None])[0]
                assert found[row, k] == pytest.approx(expected)


def test_win_rates_without_the_references_responses_are_refused() -> None:
    """Nothing to compare with: how many prompts, and which setting."""
    with pytest.raises(ValueError, match=r"1 prompts have fewer.*samples\.proposals"):
        win_values(np.zeros((4, 1)), np.array([True, True, False, True]), np.array([0, 2, 4]))
