"""The exact fit: the shared vectors, the conditions of an optimum, and the cases that break a careless solver."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_ray.maths.exact_fit import FitError, solve
from mpo_ray.maths.partition import gap, gradient, objective
from mpo_ray.maths.sample_table import SampleTable
from mpo_ray.maths.simplex import uniform


@pytest.fixture(scope="module")
def cases(shared: Path) -> list[dict[str, Any]]:
    return list(json.loads((shared / "vectors" / "mpo.json").read_text())["cases"])


def test_every_shared_vector_is_solved_to_its_optimum(cases: list[dict[str, Any]]) -> None:
    """F(λ) = F(λ*) to 1e-9, λ = λ* to 1e-4 where it is unique, gap ≤ 1e-8: overflow, boundary, duplicates, K = 1."""
    names = set()
    for case in cases:
        fit = solve(SampleTable.of_reference(np.array(case["log_ratios_sampled"])))
        names.add(case["name"])
        assert fit.objective[0] == pytest.approx(case["objective"], abs=1e-9), case["name"]
        assert fit.gap[0] <= 1e-8, case["name"]
        if case.get("unique_weights", True):
            np.testing.assert_allclose(fit.weights[0], case["weights"], atol=1e-4, err_msg=case["name"])
    assert names >= {"overflowing_log_ratios", "boundary", "duplicated_policy", "single_objective", "strong_policies"}


@pytest.mark.parametrize("seed", range(40))
def test_the_reported_numbers_are_those_of_the_table_and_the_gap_is_closed(seed: int) -> None:
    """λ ∈ Δ, F and ∇F as `partition` has them, gap ≤ 1e-9, on tables of every size, scale and shift."""
    rng = np.random.default_rng(seed)
    num_objectives, num_prompts = int(rng.integers(1, 9)), int(rng.integers(1, 30))
    numbers = rng.integers(2, 9, size=num_prompts)
    scales = np.exp(rng.normal(0, 1.5, size=num_objectives))
    rows = rng.normal(size=(int(numbers.sum()), num_objectives)) * scales + rng.normal(size=num_objectives)
    table = SampleTable(rows, rng.normal(size=len(rows)), np.cumsum([0, *numbers]))
    fit = solve(table)
    weights = fit.weights[0]
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert objective(table, weights) == pytest.approx(fit.objective[0], abs=1e-9)
    np.testing.assert_allclose(gradient(table, weights), fit.gradient[0], atol=1e-9)
    assert gap(gradient(table, weights), weights) <= 1e-9 * max(1.0, float(np.abs(rows).max()))
    for other in rng.dirichlet(np.ones(num_objectives), size=20):
        assert objective(table, other) >= fit.objective[0] - 1e-9


def test_many_problems_side_by_side_are_each_solved() -> None:
    """Shares of prompts: problem d is the fit on a table that holds prompt p n_dp times."""
    rng = np.random.default_rng(3)
    log_ratios = rng.normal(size=(12, 5, 3)) + np.array([0.3, 0.0, -0.2])
    counts = rng.multinomial(12, np.full(12, 1 / 12), size=6)
    together = solve(SampleTable.of_reference(log_ratios), shares=counts / 12)
    for d, row in enumerate(counts):
        alone = solve(SampleTable.of_reference(np.repeat(log_ratios, row, axis=0)))
        np.testing.assert_allclose(together.weights[d], alone.weights[0], atol=1e-5)
        assert together.objective[d] == pytest.approx(alone.objective[0], abs=1e-9)
    assert len({tuple(row.round(6)) for row in together.weights}) > 1


def test_the_answer_does_not_depend_on_where_the_solver_starts() -> None:
    """F is convex: from every vertex and from the inside the same optimum."""
    table = SampleTable.of_reference(np.random.default_rng(0).normal(size=(30, 4, 3)))
    found = [solve(table, start=start).weights[0] for start in [uniform(3), *np.eye(3)]]
    for weights in found[1:]:
        np.testing.assert_allclose(weights, found[0], atol=1e-6)


def test_policies_that_say_nothing_leave_the_weights_where_they_are() -> None:
    """ℓ = 0: F = 0 everywhere, the gap is 0 at once."""
    fit = solve(SampleTable.of_reference(np.zeros((4, 3, 2))))
    assert fit.weights[0].tolist() == [0.5, 0.5]
    assert (fit.objective[0], fit.gap[0], fit.passes) == (0.0, 0.0, 1)


def test_a_prompt_with_a_single_response_is_refused() -> None:
    """m = 1 makes F linear there."""
    table = SampleTable(np.zeros((3, 2)), np.zeros(3), np.array([0, 2, 3]))
    with pytest.raises(ValueError, match=r"1 of 2 prompts have m = 1 response \(the first is prompt 1\)"):
        solve(table)


def test_a_fit_that_is_not_finished_says_so_and_does_not_answer() -> None:
    """max_passes too few: the gap that is left, and what to do."""
    table = SampleTable.of_reference(np.random.default_rng(0).normal(size=(30, 4, 3)))
    with pytest.raises(FitError, match=r"gap of .* after 2 passes .*method: bsmd"):
        solve(table, max_passes=2)


SCALES = (1e-9, 1e-6, 1e-3, 1.0, 30.0, 1e3, 1e6)


@pytest.mark.parametrize("scale", SCALES)
def test_two_opposed_responses_have_their_known_optimum_at_any_scale(scale: float) -> None:
    """ℓ = s (a, 0) and s (0, b), one each: ∂F = 0 at λ_1 = (b + log(b/a)/s)/(a + b), or the nearer end of [0, 1]."""
    a, b = 1.7, 0.6
    table = SampleTable.of_reference(scale * np.array([[[a, 0.0], [0.0, b]]]))
    fit = solve(table, start=np.array([0.9, 0.1]))
    known = float(np.clip((b + np.log(b / a) / scale) / (a + b), 0.0, 1.0))
    assert fit.weights[0, 0] == pytest.approx(known, abs=1e-6)
    assert fit.gap[0] <= 1e-7 * scale


@pytest.mark.parametrize("size", [2, 5, 30])
@pytest.mark.parametrize("scale", SCALES)
def test_objectives_that_change_places_share_the_weight_at_any_scale(scale: float, size: int) -> None:
    """A table with every rotation of its columns: F(λ) = F(λ rotated), so by convexity λ* = 1/K. From far off."""
    log_ratios = np.random.default_rng(size).normal(size=(4, 5, size))
    turned = np.concatenate([np.roll(log_ratios, turn, axis=2) for turn in range(size)])
    table = SampleTable.of_reference(scale * turned)
    start = np.eye(size)[0] * 0.9 + 0.1 / size
    fit = solve(table, start=start)
    assert fit.gap[0] <= 1e-6 * scale
    assert fit.objective[0] == pytest.approx(objective(table, uniform(size)), abs=1e-6 * scale)
    if scale >= 1.0:  # below, F is flat: any λ is within the gap
        np.testing.assert_allclose(fit.weights[0], 1.0 / size, atol=1e-3)


@pytest.mark.parametrize("scale", SCALES)
def test_the_policies_samples_are_solved_at_any_scale_too(scale: float) -> None:
    """log p̄/π_ref grows with ℓ; a large offset of ℓ, common to the responses of a prompt, changes nothing."""
    rng = np.random.default_rng(5)
    log_ratios = scale * rng.normal(size=(60, 3))
    proposal = np.logaddexp.reduce(np.column_stack([np.zeros(60), log_ratios]), axis=1) - np.log(4)
    starts = np.arange(11, dtype=np.int64) * 6
    fit = solve(SampleTable(log_ratios, proposal, starts))
    assert fit.gap[0] <= 1e-6 * scale
    offset = np.repeat(rng.normal(size=(10, 1)), 6, axis=0) * scale
    moved = solve(SampleTable(log_ratios + offset, proposal + offset[:, 0], starts))
    assert moved.objective[0] == pytest.approx(fit.objective[0], abs=1e-6 * scale)


@pytest.mark.parametrize("broken", [np.nan, -np.inf, np.inf])
def test_log_ratios_that_are_not_finite_are_refused_with_their_row(broken: float) -> None:
    log_ratios = np.zeros((3, 2, 2))
    log_ratios[1, 0, 1] = broken
    with pytest.raises(ValueError, match="log-ratio of policy 1 in row 2 is"):
        solve(SampleTable.of_reference(log_ratios))
