"""The mirror step and the check of weights."""

from __future__ import annotations

from itertools import product
from math import comb

import numpy as np
import pytest

from mpo_ray.maths.simplex import check_simplex, exponentiated_gradient_step, simplex_grid, uniform


def test_the_mirror_step_minimises_the_linear_model_plus_divergence() -> None:
    """λ⁺ = argmin_{λ'∈Δ} ⟨v, λ'⟩ + KL(λ' ‖ λ)/η, whose minimum is −(1/η) log Σ_k λ_k exp(−η v_k)."""
    rng = np.random.default_rng(0)
    weights, gradient, step_size = rng.dirichlet(np.ones(4)), rng.normal(size=4), 0.7

    def model(candidate: np.ndarray) -> float:
        return float(gradient @ candidate + candidate @ np.log(candidate / weights) / step_size)

    found = np.exp(exponentiated_gradient_step(np.log(weights), gradient, step_size))
    check_simplex(found)
    assert model(found) == pytest.approx(-np.log(weights @ np.exp(-step_size * gradient)) / step_size)
    assert all(model(found) < model(other) for other in rng.dirichlet(np.ones(4), size=200))


def test_a_constant_gradient_does_not_move_the_weights() -> None:
    """exp(−η c) cancels in the normalisation."""
    weights = np.array([0.1, 0.2, 0.7])
    moved = exponentiated_gradient_step(np.log(weights), np.full(3, 40.0), 2.0)
    np.testing.assert_allclose(np.exp(moved), weights, rtol=1e-12)


def test_a_weight_below_the_smallest_float_comes_back() -> None:
    """A step of +v and one of −v cancel, even where λ_k passes through exp(−2000)."""
    start = np.log(uniform(2))
    away = exponentiated_gradient_step(start, np.array([2000.0, 0.0]), 1.0)
    assert np.exp(away[0]) == 0.0
    back = exponentiated_gradient_step(away, np.array([-2000.0, 0.0]), 1.0)
    np.testing.assert_allclose(np.exp(back), [0.5, 0.5], rtol=1e-9)


def test_a_weight_of_zero_stays_zero() -> None:
    """λ_k exp(−η v_k) = 0 for λ_k = 0."""
    moved = exponentiated_gradient_step(np.array([-np.inf, 0.0, 0.0]), np.array([-5.0, 0.0, 1.0]), 1.0)
    assert np.exp(moved)[0] == 0.0
    check_simplex(np.exp(moved))


def test_the_centre_is_on_the_simplex() -> None:
    """λ_k = 1/K."""
    assert check_simplex(uniform(3)).tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ([0.5, 0.6], "sum to 1.1, not 1"),
        ([1.5, -0.5], "at least 0"),
        ([np.nan, 1.0], "finite"),
        ([[0.5, 0.5]], r"shape \(1, 2\)"),
        ([], r"shape \(0,\)"),
    ],
)
def test_weights_off_the_simplex_are_refused_with_their_values(weights: list[float], complaint: str) -> None:
    """λ_k ≥ 0, Σ_k λ_k = 1."""
    with pytest.raises(ValueError, match=complaint):
        check_simplex(np.array(weights))


@pytest.mark.parametrize(("num_objectives", "steps"), [(1, 3), (2, 4), (3, 5), (4, 3)])
def test_the_grid_is_every_multiple_of_one_step_on_the_simplex_once(num_objectives: int, steps: int) -> None:
    """{n/s : n ∈ ℕ^K, Σ n = s}, C(s + K − 1, K − 1) of them, in order."""
    expected = [n for n in product(range(steps + 1), repeat=num_objectives) if sum(n) == steps]
    grid = simplex_grid(num_objectives, steps)
    assert len(grid) == len(expected) == comb(steps + num_objectives - 1, num_objectives - 1)
    np.testing.assert_array_equal(grid, np.array(expected) / steps)


def test_a_grid_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 objective and 1 step; got 2 and 0"):
        simplex_grid(2, 0)
