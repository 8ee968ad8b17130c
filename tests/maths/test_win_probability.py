"""Average win probabilities of a pool's candidates: their definition, and that no candidate meets itself."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from mpo_ray.maths.win_probability import (
    LINKS,
    bradley_terry,
    order,
    win_probabilities_from_labels,
    win_probabilities_in_pool,
)

STARTS = np.array([0, 3, 5])
REWARDS = np.array([1.0, 3.0, 1.0, -2.0, 0.0])


def test_a_candidate_is_compared_with_every_other_of_its_prompt_and_never_with_itself() -> None:
    """Trap 5: with itself the mean would be drawn to ½; ties count half."""
    hard, errors = win_probabilities_in_pool(REWARDS, STARTS, order)
    np.testing.assert_allclose(hard, [0.25, 1.0, 0.25, 0.0, 1.0])
    np.testing.assert_allclose(errors, [0.25 / np.sqrt(2), 0.0, 0.25 / np.sqrt(2), 0.0, 0.0])
    soft, _ = win_probabilities_in_pool(REWARDS, STARTS, bradley_terry)
    assert soft[0] == pytest.approx((expit(-2.0) + 0.5) / 2)
    assert soft[3] == pytest.approx(expit(-2.0))


@pytest.mark.parametrize("link", LINKS)
def test_a_prompt_s_mean_is_one_half_whatever_the_rewards_are(link: str) -> None:
    rng = np.random.default_rng(0)
    starts = np.cumsum([0, 2, 7, 4])
    found, _ = win_probabilities_in_pool(rng.normal(size=13) * 5, starts, LINKS[link])
    np.testing.assert_allclose(np.add.reduceat(found, starts[:-1]) / np.diff(starts), 0.5, atol=1e-12)


def test_the_pool_s_estimate_is_unbiased() -> None:
    """E over m = 3 samples of p̄(y_1) given y_1 = Σ_{y'} π_ref(y') P(y_1 ≻ y'), by enumeration of the opponents."""
    reference, rewards = np.array([0.2, 0.5, 0.3]), np.array([0.0, 1.0, 2.5])
    exact = bradley_terry(rewards[:, None] - rewards) @ reference
    for first in range(3):
        mean = 0.0
        for second in range(3):
            for third in range(3):
                drawn = rewards[[first, second, third]]
                found = win_probabilities_in_pool(drawn, np.array([0, 3]), bradley_terry)[0][0]
                mean += reference[second] * reference[third] * found
        assert mean == pytest.approx(exact[first], abs=1e-12)


def test_opponents_count_by_their_shares_of_the_reference() -> None:
    """Each candidate once, with its probability: p̄ is the exact sum over the other candidates, renormalised."""
    shares, rewards = np.array([0.2, 0.5, 0.3]), np.array([0.0, 1.0, 2.5])
    found, _ = win_probabilities_in_pool(rewards, np.array([0, 3]), bradley_terry, np.log(shares))
    assert found[0] == pytest.approx((0.5 * expit(-1.0) + 0.3 * expit(-2.5)) / 0.8)
    assert found[2] == pytest.approx((0.2 * expit(2.5) + 0.5 * expit(1.5)) / 0.7)
    alike, errors = win_probabilities_in_pool(REWARDS, STARTS, bradley_terry, np.log([1 / 3, 1 / 3, 1 / 3, 0.5, 0.5]))
    expected = win_probabilities_in_pool(REWARDS, STARTS, bradley_terry)
    np.testing.assert_allclose((alike, errors), expected)


def test_who_wins_always_wins_with_probability_1_and_no_more() -> None:
    """Whatever the shares are: rounding leads to no value outside [0, 1]."""
    rng = np.random.default_rng(0)
    starts = np.arange(301) * 12
    shares = np.log(rng.dirichlet(np.ones(12), size=300)).ravel()
    found, _ = win_probabilities_in_pool(
        rng.permuted(np.tile(np.arange(12.0), (300, 1)), axis=1).ravel(), starts, order, shares
    )
    assert found.max() == 1.0
    assert found.min() == 0.0


def test_the_error_is_that_of_a_mean_over_the_opponents() -> None:
    """Over many pools, the squared error of p̄ against the exact value is the mean of the squared standard errors."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(20_000, 25))
    rewards[:, 0] = 0.7
    found, errors = win_probabilities_in_pool(rewards.ravel(), np.arange(20_001) * 25, order)
    exact = 0.7580363  # Φ(0.7)
    first = np.arange(20_000) * 25
    assert np.mean(np.square(found[first] - exact)) == pytest.approx(np.mean(np.square(errors[first])), rel=0.06)


def test_labels_give_the_share_of_comparisons_won_with_ties_as_halves() -> None:
    winners, losers, shares = np.array([0, 0, 1]), np.array([1, 2, 2]), np.array([1.0, 0.5, 1.0])
    found = win_probabilities_from_labels(winners, losers, shares, 4)
    np.testing.assert_allclose(found[:3], [0.75, 0.5, 0.25])
    assert np.isnan(found[3])
