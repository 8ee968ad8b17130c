"""The decisions of the RL baselines: MaxMin-RLHF follows the objective whose expectation is lowest."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from rl_objectives import WorstObjective, log_odds_per_unit, moments, plateaued
from rl_training import MAXMIN, MORLHF, TrainingReward


def test_the_worst_objective_is_the_one_with_the_lowest_expectation_not_the_one_that_is_lowest_most_often() -> None:
    """Objective 0 is the lower one in nine responses of ten; the expectation of 1 is lower all the same."""
    rewards = np.array([[0.0, 0.1]] * 9 + [[0.0, -5.0]])
    assert WorstObjective()(rewards) == 1


def test_a_single_bad_batch_does_not_turn_the_running_average_round() -> None:
    """E_k ← E_k + a (mean − E_k): one outlier of weight a = 0.3 moves E_0 from 1 to 0.4, still above E_1 = 0."""
    worst = WorstObjective(newest=0.3)
    good, bad = np.array([[1.0, 0.0]]), np.array([[-1.0, 0.0]])
    assert [worst(good), worst(bad), worst(bad)] == [1, 1, 0]
    assert worst.expected == pytest.approx([-0.02, 0.0])


def test_ascent_on_the_worst_objective_ends_where_both_are_equal() -> None:
    """max_x min(x, 1 − x) = ½ at x = ½: each step raises the objective that is lower, which lowers the other."""
    worst, x = WorstObjective(newest=1.0), 0.0
    for _ in range(200):
        x += 0.01 if worst(np.array([[x, 1.0 - x]])) == 0 else -0.01
    assert x == pytest.approx(0.5, abs=0.02)


def test_maxmin_trains_on_one_objective_of_a_batch_and_morlhf_on_the_mean_of_all() -> None:
    table = np.array([[1.0, -1.0], [3.0, -2.0]])

    def rewards(prompts: object, responses: object, ids: object) -> np.ndarray:
        return table

    given = {"prompts": ["a", "a"], "completions": ["b", "c"], "completion_ids": [[1], [2, 3]]}
    assert TrainingReward(MAXMIN, rewards)(**given) == [-1.0, -2.0]
    averaging = TrainingReward(MORLHF, rewards)
    assert averaging(**given) == [0.0, 0.5]
    assert averaging.last == {"rewards": [2.0, -1.5], "objective": None, "tokens": 3}


def test_standardised_by_its_moments_a_reward_has_mean_0_and_deviation_1_under_the_reference() -> None:
    rewards = np.random.default_rng(0).normal([3.0, -7.0], [0.1, 20.0], size=(500, 2))
    mean, deviation = moments(rewards, ["a", "b"])
    scaled = (rewards - mean) / deviation
    assert scaled.mean(axis=0) == pytest.approx(0.0, abs=1e-12)
    assert scaled.std(axis=0) == pytest.approx(1.0)


def test_a_reward_that_never_varies_cannot_be_standardised() -> None:
    with pytest.raises(ValueError, match=r"objective 'flat' is the same for all 4 completions .* --reward implicit"):
        moments(np.column_stack([np.arange(4.0), np.ones(4)]), ["steep", "flat"])


def test_a_rising_curve_has_no_plateau_and_a_flat_one_has() -> None:
    noise = np.random.default_rng(1).normal(0.0, 0.1, 100)
    rising, flat = np.linspace(0.0, 2.0, 100) + noise, noise
    assert not any(plateaued(rising[:n].tolist(), 20) for n in range(101))
    assert any(plateaued(flat[:n].tolist(), 20) for n in range(101))
    assert not plateaued(flat[:39].tolist(), 20)


def test_the_worth_of_a_reward_is_found_from_pairs_that_were_drawn_with_it() -> None:
    """P(chosen ≻ rejected) = σ(s Δ): the estimate is s for many pairs, and solves Σ σ(−s d) d = 0."""
    rng, scale = np.random.default_rng(2), 1.7
    delta = rng.normal(0.0, 1.5, 20_000)
    differences = np.where(rng.random(20_000) < 1 / (1 + np.exp(-scale * delta)), delta, -delta)
    found = log_odds_per_unit(differences)
    assert found == pytest.approx(scale, rel=0.05)
    assert (differences / (1 + np.exp(found * differences))).sum() == pytest.approx(0.0, abs=1e-6)
    assert log_odds_per_unit(10 * differences) == pytest.approx(found / 10)


def test_pairs_that_never_or_mostly_contradict_a_reward_do_not_say_what_it_is_worth() -> None:
    with pytest.raises(ValueError, match=r"^0 of 3 pairs prefer .* Give --beta\."):
        log_odds_per_unit(np.array([1.0, 2.0, 0.5]))
    with pytest.raises(ValueError, match=r"^2 of 3 pairs prefer .* Give --beta\."):
        log_odds_per_unit(np.array([-1.0, -2.0, 0.5]))
