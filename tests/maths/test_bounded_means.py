"""Intervals of win rates: exact where they can be, at least nominal coverage everywhere, at 0 and 1 too."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta, norm

from mpo_ray.maths import bounded_means as module
from mpo_ray.maths.bounded_means import (
    BoundedMeans,
    Difference,
    bounded_means,
    difference_of_minima,
    fixed_means,
    mean_bounds,
    minimum_bounds,
    prompts_to_decide,
)


def drawn(values: np.ndarray, draws: int = 300, seed: int = 0) -> BoundedMeans:
    return bounded_means(np.asarray(values, dtype=float), draws, np.random.default_rng(seed))


@pytest.mark.parametrize("wins", [0, 1, 12, 23, 24])
def test_wins_and_losses_have_the_interval_of_clopper_and_pearson(wins: int):
    """low = Beta⁻¹(α/2; s, n − s + 1), high = Beta⁻¹(1 − α/2; s + 1, n − s); 24 of 24 is [0.858, 1]."""
    column = np.repeat([1.0, 0.0], [wins, 24 - wins])[:, None]
    low, high = mean_bounds(drawn(column, 40_000), 0.95)[0]
    exact_low = beta.ppf(0.025, wins, 25 - wins) if wins else 0.0
    exact_high = beta.ppf(0.975, wins + 1, 24 - wins) if wins < 24 else 1.0
    assert low == pytest.approx(exact_low, abs=0.004)
    assert high == pytest.approx(exact_high, abs=0.004)


@pytest.mark.parametrize("num_prompts", [24, 256])
@pytest.mark.parametrize("probability", [0.5, 0.95, 0.99, 1.0])
def test_the_interval_covers_at_least_as_often_as_it_says(num_prompts: int, probability: float):
    """95 % intervals over 250 data sets: one completion per prompt, and two against two with prompts that differ."""
    rng = np.random.default_rng(1)
    covered, width = np.zeros(2), np.zeros(2)
    for _ in range(250):
        single = rng.binomial(1, probability, num_prompts)
        by_prompt = rng.beta(3 * probability, 3 * (1 - probability), num_prompts) if probability < 1 else 1.0
        four = rng.binomial(4, by_prompt, num_prompts) / 4
        bounds = mean_bounds(bounded_means(np.stack([single, four], axis=1), 200, rng), 0.95)
        covered += (bounds[:, 0] <= probability) & (probability <= bounds[:, 1])
        width += np.ptp(bounds, axis=1) / 250
    assert (covered / 250 >= 0.92).all()  # 0.95 less two standard errors of 0.014
    normal = 2 * norm.ppf(0.975) * np.sqrt(probability * (1 - probability) / num_prompts)
    assert width[0] < 1.1 * normal + 5 / num_prompts  # not much wider than it must be
    assert width[1] < (width[0] if probability < 1 else 1.05 * width[0])  # four pairs of a prompt tell more than one


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_equal_values_of_all_prompts_are_no_certainty(value: float):
    """The rule of three: a width of about 3.7/P for 95 %, and never beyond 0 and 1."""
    low, high = mean_bounds(drawn(np.full((24, 1), value), 4000), 0.95)[0]
    assert 0.0 <= low <= value <= high <= 1.0
    assert high - low > 0.13


@pytest.mark.parametrize("num_prompts", [24, 256])
@pytest.mark.parametrize("probability", [0.5, 0.95, 0.99, 1.0])
def test_the_interval_of_the_minimum_covers_for_balanced_objectives(num_prompts: int, probability: float):
    """Three objectives with one true win rate, where the minimum of the estimates lies low, and the difference of 0."""
    rng = np.random.default_rng(2)
    covered = np.zeros(2)
    for _ in range(100):
        found = bounded_means(rng.binomial(1, probability, (num_prompts, 6)).astype(float), 200, rng)
        ours, theirs = found.columns(0, 3), found.columns(3, 6)
        low, high = minimum_bounds(ours, 0.95)
        difference = difference_of_minima(ours, theirs, 0.95)
        covered += [low <= probability <= high, difference.low <= 0.0 <= difference.high]
        assert low <= ours.mean.min() <= high
        assert difference.low <= difference.value <= difference.high
    assert (covered / 100 >= 0.9).all()


def test_the_difference_of_minima_covers_where_the_minima_are_at_different_objectives_and_pairing_pays():
    """min(0.7, 0.55) − min(0.4, 0.8) = 0.15, noise shared by prompt: narrower than from two sets of prompts."""
    rng = np.random.default_rng(3)
    covered, paired, unpaired = 0, 0.0, 0.0
    for _ in range(100):
        shared = rng.uniform(-0.2, 0.2, size=(400, 1))
        means = shared + np.array([0.7, 0.55, 0.4, 0.79])
        found = bounded_means(np.clip(means + rng.uniform(-0.01, 0.01, means.shape), 0, 1), 200, rng)
        other = bounded_means(np.clip(means, 0, 1), 200, rng)
        difference = difference_of_minima(found.columns(0, 2), found.columns(2, 4), 0.9)
        covered += difference.low <= 0.15 <= difference.high
        paired += difference.high - difference.low
        apart = difference_of_minima(found.columns(0, 2), other.columns(2, 4), 0.9)
        unpaired += apart.high - apart.low
    assert covered >= 90
    assert paired < 0.7 * unpaired


def test_a_difference_that_is_equal_on_all_prompts_is_no_certainty():
    """24 ties of two candidates that both won everything: a difference of 0, and an interval around it."""
    found = drawn(np.ones((24, 4)))
    difference = difference_of_minima(found.columns(0, 2), found.columns(2, 4), 0.95)
    assert difference.value == 0.0
    assert difference.low < -0.1 < 0.1 < difference.high


def test_values_that_are_not_there_are_left_out():
    """The mean and the interval of 12 values among 30 prompts are those of 12 prompts."""
    values, read = np.ones((30, 1)), np.arange(30)[:, None] < 12
    found = bounded_means(values, 20_000, np.random.default_rng(4), read=read)
    assert found.mean[0] == 1.0
    assert mean_bounds(found, 0.95)[0, 0] == pytest.approx(beta.ppf(0.025, 12, 1), abs=0.005)
    nothing = bounded_means(values, 10, np.random.default_rng(4), read=np.zeros((30, 1), dtype=bool))
    assert np.isnan(nothing.mean[0])
    assert nothing.low[0, 0] == 0.0


def test_what_holds_by_definition_has_no_spread():
    fixed = fixed_means(0.5, drawn(np.ones((5, 2))))
    assert minimum_bounds(fixed, 0.9) == (0.5, 0.5)


def test_the_draws_do_not_depend_on_the_block(monkeypatch):
    values = np.random.default_rng(5).random((6, 2))
    whole = drawn(values)
    monkeypatch.setattr(module, "BLOCK", 50)
    blocks = drawn(values)
    np.testing.assert_allclose(whole.low, blocks.low, rtol=1e-12)
    np.testing.assert_allclose(whole.high, blocks.high, rtol=1e-12)


def test_so_many_prompts_as_are_told_decide_in_four_of_five_repetitions():
    """A true difference of 0.1 (single objective), undecided on 60 prompts: n decides about 80 %."""
    rng = np.random.default_rng(6)
    error = np.sqrt((0.55 * 0.45 + 0.45 * 0.55) / 60)
    found = Difference(0.1, -0.05, 0.25, error)
    number = prompts_to_decide(found, num_prompts=60, num_objectives=1, confidence=0.95)
    assert number == int(np.ceil(60 * ((norm.ppf(0.975) + norm.ppf(0.8)) * error / 0.1) ** 2))
    decided = 0
    for _ in range(100):
        values = np.stack([rng.binomial(1, p, number) for p in (0.55, 0.45)], axis=1).astype(float)
        means = bounded_means(values, 200, rng)
        decided += difference_of_minima(means.columns(0, 1), means.columns(1, 2), 0.95).low > 0
    assert 65 <= decided <= 92


@pytest.mark.parametrize(
    ("found", "number"),
    [
        (Difference(0.1, 0.01, 0.2, 0.05), None),  # decided
        (Difference(-0.1, -0.2, -0.01, 0.05), None),
        (Difference(0.0, -0.1, 0.1, 0.05), None),  # nothing to tell from 0
        (Difference(1e-6, -0.1, 0.1, 0.05), None),  # over a million
        (Difference(0.2, -0.01, 0.3, 1e-4), 61),  # at least one prompt more
    ],
)
def test_no_number_is_told_where_none_would_help(found: Difference, number: int | None):
    assert prompts_to_decide(found, num_prompts=60, num_objectives=3, confidence=0.95) == number


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: drawn(np.full((3, 1), 1.5)), "between 0 and 1"),
        (lambda: drawn(np.zeros((0, 1))), "got 0 prompts and 300 draws"),
        (lambda: drawn(np.zeros((3, 1)), 0), "got 3 prompts and 0 draws"),
        (lambda: mean_bounds(drawn(np.zeros((3, 1))), 95.0), "between 0 and 1, such as 0.95; got 95"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
