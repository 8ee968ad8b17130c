"""Win probabilities and the paired bootstrap, against exact answers and nominal coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mpo_ray.maths import statistics
from mpo_ray.maths.statistics import (
    SignTest,
    binomial_tail,
    bootstrap_counts,
    bootstrap_means,
    interval,
    sign_test,
    win_probabilities,
)


def test_win_probability_is_the_mean_over_all_pairs_with_ties_as_a_half():
    """W(x) = mean_{i,j} 1[r_i > r'_j] + ½ 1[r_i = r'_j], written out pair by pair."""
    rng = np.random.default_rng(0)
    candidate = rng.integers(0, 4, (5, 3)).astype(float)
    reference = rng.integers(0, 4, (5, 2)).astype(float)
    expected = [
        np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(candidate[p], reference[p])])
        for p in range(5)
    ]
    np.testing.assert_allclose(win_probabilities(candidate, reference), expected, rtol=0, atol=1e-15)


def test_a_candidate_ties_with_itself():
    """W = ½ for every prompt when both sides hold the same rewards."""
    rewards = np.random.default_rng(1).normal(size=(7, 4))
    np.testing.assert_allclose(win_probabilities(rewards, rewards), 0.5, rtol=0, atol=1e-15)


def test_win_probabilities_of_the_two_sides_sum_to_one():
    """W(a, b) + W(b, a) = 1: ties are shared."""
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 3, (20, 3)).astype(float), rng.integers(0, 3, (20, 5)).astype(float)
    np.testing.assert_allclose(win_probabilities(a, b) + win_probabilities(b, a), 1.0, rtol=0, atol=1e-15)


def test_win_probabilities_ignore_monotone_changes_of_the_reward():
    """A win rate sees only the order: exp(r) gives the same."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(10, 2)), rng.normal(size=(10, 3))
    np.testing.assert_array_equal(win_probabilities(np.exp(a), np.exp(b)), win_probabilities(a, b))


def test_resampling_keeps_the_number_of_prompts_and_does_not_depend_on_the_block(monkeypatch):
    """Each row of counts sums to P, each prompt's mean count is 1, and blocks of any size are one stream."""
    whole = np.concatenate(list(bootstrap_counts(6, 4000, np.random.default_rng(4))))
    assert whole.shape == (4000, 6)
    assert (whole.sum(axis=1) == 6).all()
    np.testing.assert_allclose(whole.mean(axis=0), 1.0, atol=0.06)  # standard error 0.014
    monkeypatch.setattr(statistics, "BLOCK", 50)
    blocks = list(bootstrap_counts(6, 4000, np.random.default_rng(4)))
    assert len(blocks) == 500
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_bootstrap_means_have_the_variance_of_a_mean_of_resampled_prompts():
    """Var(x̄*) = (1/P) · (1/P) Σ (x − x̄)², the plug-in variance of the mean; E[x̄*] = x̄."""
    values = np.random.default_rng(5).gamma(2.0, size=(40, 2))
    draws = bootstrap_means(values, 20_000, np.random.default_rng(6))
    np.testing.assert_allclose(draws.mean(axis=0), values.mean(axis=0), atol=0.005)
    np.testing.assert_allclose(draws.std(axis=0), values.std(axis=0) / np.sqrt(40), rtol=0.02)


def test_draws_are_paired_over_columns():
    """The same prompts for every column: a shift between two columns is the same in every draw."""
    rng = np.random.default_rng(7)
    column = rng.normal(size=(30, 1))
    draws = bootstrap_means(np.hstack([column, column + 0.25, column]), 500, rng)
    np.testing.assert_allclose(draws[:, 1] - draws[:, 0], 0.25, rtol=0, atol=1e-12)
    low, high = interval(draws[:, 2] - draws[:, 0], 0.95)
    assert low == high == 0.0


def test_a_constant_statistic_has_an_interval_of_width_zero():
    draws = bootstrap_means(np.full((17, 1), 0.1), 300, np.random.default_rng(8))
    assert interval(draws[:, 0], 0.95) == (0.1, 0.1)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_covers_the_true_mean_at_about_the_nominal_rate(confidence):
    """P(low ≤ μ ≤ high) ≈ confidence, over 600 data sets of 80 prompts with win probabilities of mean 0.6."""
    rng = np.random.default_rng(9)
    covered = 0
    for _ in range(600):
        wins = rng.binomial(2, 0.6, size=(80, 1)) / 2.0
        low, high = interval(bootstrap_means(wins, 400, rng)[:, 0], confidence)
        covered += low <= 0.6 <= high
    assert abs(covered / 600 - confidence) < 0.05  # standard error 0.016 and 0.009


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: win_probabilities(np.zeros((2, 1)), np.zeros((3, 1))), r"same prompts; got \(2, 1\) and \(3, 1\)"),
        (lambda: win_probabilities(np.zeros((2, 0)), np.zeros((2, 1))), "nothing to compare"),
        (lambda: win_probabilities(np.array([[np.nan]]), np.zeros((1, 1))), "must be finite"),
        (lambda: bootstrap_means(np.zeros((1, 1)), 10, np.random.default_rng(0)), "at least 2 prompts.*got 1 prompts"),
        (lambda: interval(np.zeros(3), 95.0), "between 0 and 1.*got 95"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_binomial_tail_is_the_sum_of_the_coefficients():
    """P(X ≤ s) = Σ_{i ≤ s} C(n, i) / 2^n, exactly, also where 2^−n is below the smallest float."""
    for trials in (0, 1, 5, 40):
        for successes in range(trials + 1):
            exact = sum(math.comb(trials, i) for i in range(successes + 1)) / 2**trials
            assert binomial_tail(successes, trials) == pytest.approx(exact, rel=1e-12)
    exact = sum(math.comb(5000, i) for i in range(2401)) / 2**5000
    assert binomial_tail(2400, 5000) == pytest.approx(exact, rel=1e-9)


def test_the_sign_test_is_exact_two_sided_and_leaves_ties_out():
    """8 of 9 above 0: p = 2 (C(9,0) + C(9,1)) / 2⁹ = 20/512. The sides can be swapped; without signs p is 1."""
    differences = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, -1, 0, 0, 0])
    assert sign_test(differences) == SignTest(8, 1, 3, pytest.approx(20 / 512))
    assert sign_test(-differences).p_value == sign_test(differences).p_value
    assert sign_test(np.zeros(4)) == SignTest(0, 0, 4, 1.0)
    assert sign_test(np.array([1.0, -1.0])).p_value == 1.0


def test_the_sign_test_rejects_a_fair_coin_at_no_more_than_its_level():
    """P(p ≤ 0.05) ≤ 0.05 under the hypothesis, by enumeration over the number of heads."""
    level = sum(
        math.comb(30, heads) / 2**30
        for heads in range(31)
        if sign_test(np.repeat([1.0, -1.0], [heads, 30 - heads])).p_value <= 0.05
    )
    assert 0.02 < level <= 0.05
