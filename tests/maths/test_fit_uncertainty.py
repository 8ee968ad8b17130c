"""Intervals, bias and sample numbers of a fit, against what repeated sampling of an enumerable world shows."""

from __future__ import annotations

import numpy as np
import pytest

from mpo_ray.maths.exact_fit import solve
from mpo_ray.maths.fit_uncertainty import bootstrap_fit, jackknife_bias, responses_needed
from mpo_ray.maths.partition import effective_sample_size, objective
from mpo_ray.maths.sample_table import SampleTable
from tests.world import Array, World

WORLDS = [World.random(seed) for seed in range(200)]


def drawn(worlds: list[World], num_samples: int, rng: np.random.Generator) -> SampleTable:
    """num_samples responses of the even reference for each world, as one prompt each."""
    return SampleTable.of_reference(
        np.stack([w.log_ratios[rng.integers(len(w.responses), size=num_samples)] for w in worlds])
    )


def test_the_intervals_cover_the_weights_of_all_prompts_about_as_often_as_they_say() -> None:
    """80 % intervals from 60 of 200 prompts hold the 200 prompts' λ* and F in about 80 % of repetitions."""
    rng = np.random.default_rng(0)
    whole = np.stack([w.log_ratios for w in WORLDS])
    truth = solve(SampleTable.of_reference(whole))
    held: list[list[bool]] = []
    for _ in range(60):
        part = SampleTable.of_reference(whole[rng.integers(200, size=60)])
        fit = solve(part)
        found = bootstrap_fit(part, fit.weights[0], draws=100, confidence=0.8, rng=rng)
        bounds, values = [*found.weights, found.objective], [*truth.weights[0], truth.objective[0]]
        held.append([low <= value <= high for (low, high), value in zip(bounds, values, strict=True)])
    coverage = np.mean(held, axis=0)
    assert np.all(coverage > 0.6), coverage
    assert np.all(coverage < 0.95), coverage


def test_the_jackknife_finds_the_bias_of_few_samples() -> None:
    """E F̂_n(λ) − F(λ) < 0, and the jackknife estimates it within a third at n = 6, for even and ragged tables."""
    weights, rng = np.array([0.5, 0.3, 0.2]), np.random.default_rng(0)
    truth = objective(SampleTable.of_reference(np.stack([w.log_ratios for w in WORLDS])), weights)
    tables = [drawn(WORLDS, 6, rng) for _ in range(60)]
    bias = np.mean([objective(table, weights) for table in tables]) - truth
    estimate = np.mean([jackknife_bias(table, weights) for table in tables])
    assert bias < 0
    assert estimate == pytest.approx(bias, rel=0.34)
    one, two = tables[0], drawn(WORLDS, 3, rng)
    both = SampleTable(
        np.vstack([one.log_ratios, two.log_ratios]),
        np.zeros(len(one.log_ratios) + len(two.log_ratios)),
        np.concatenate([one.starts, two.starts[1:] + one.starts[-1]]),
    )
    assert jackknife_bias(both, weights) == pytest.approx(
        (jackknife_bias(one, weights) + jackknife_bias(two, weights)) / 2
    )


def test_the_jackknife_leaves_one_response_out_at_a_time() -> None:
    """(n − 1)(mean_j log Ẑ_(−j) − log Ẑ), spelled out on one prompt."""
    log_ratios, weights = np.random.default_rng(1).normal(size=(1, 4, 2)), np.array([0.3, 0.7])
    terms = np.exp(log_ratios[0] @ weights)
    left_out = np.mean([np.log(np.delete(terms, j).mean()) for j in range(4)])
    expected = 3 * (left_out - np.log(terms.mean()))
    assert jackknife_bias(SampleTable.of_reference(log_ratios), weights) == pytest.approx(expected)


def normal_table(spread: float, num_responses: int, seed: int) -> SampleTable:
    """A tilt that is normal with this standard deviation: φ = exp(−spread²)."""
    rows: Array = np.random.default_rng(seed).normal(0, spread, size=(400, num_responses, 1))
    return SampleTable.of_reference(rows)


def test_the_number_of_responses_that_would_do_does() -> None:
    """With as many responses as it asks for, the median effective sample size is about what was wanted, 4."""
    for spread in (0.8, 1.5):
        needed = responses_needed(normal_table(spread, 8, 0), np.ones(1))
        found = np.median(effective_sample_size(normal_table(spread, needed, 1), np.ones(1)))
        assert 2.5 < found < 12.0, (spread, needed, found)
    assert responses_needed(normal_table(6.0, 8, 0), np.ones(1)) > 1e9, "σ = 6 nats: no number of samples will do"


def test_a_large_table_is_resampled_in_part_with_the_width_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The m-out-of-n bootstrap of 200 prompts by 50 has about the width of the whole one, around the same fit."""
    table = SampleTable.of_reference(np.stack([w.log_ratios for w in WORLDS]))
    start = solve(table).weights[0]
    whole = bootstrap_fit(table, start, draws=200, confidence=0.9, rng=np.random.default_rng(0))
    monkeypatch.setattr("mpo_ray.maths.fit_uncertainty.MOST_PROMPTS", 50)
    part = bootstrap_fit(table, start, draws=200, confidence=0.9, rng=np.random.default_rng(0))
    for one, other in zip([*whole.weights, whole.objective], [*part.weights, part.objective], strict=True):
        assert 0.6 < (other[1] - other[0]) / (one[1] - one[0]) < 1.6
        assert other.mean() == pytest.approx(one.mean(), abs=0.25 * (one[1] - one[0]))
