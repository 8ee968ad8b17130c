"""The partition function, its objective and gradient: the shared vectors, and the theorems of design 2.2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_ray.maths.partition import effective_sample_size, gap, gradient, log_partition, objective, tilted_weights
from mpo_ray.maths.simplex import exponentiated_gradient_step, uniform
from tests.world import Array, World


@pytest.fixture(scope="module")
def cases(shared: Path) -> list[dict[str, Any]]:
    return list(json.loads((shared / "vectors" / "mpo.json").read_text())["cases"])


@pytest.fixture(scope="module")
def exact() -> Array:
    """(B, N, K): ℓ of every response of four worlds whose reference is even, so that means over N are exact."""
    return np.stack([World.random(seed).log_ratios for seed in range(4)])


def simplex_points(num_objectives: int, num_points: int = 30) -> Array:
    return np.random.default_rng(0).dirichlet(np.ones(num_objectives), size=num_points)


def optimum(log_ratios: Array, num_steps: int = 3000) -> Array:
    """λ* by mirror steps with the full gradient, which is small where F is as smooth as in these worlds."""
    log_weights = np.log(uniform(log_ratios.shape[2]))
    for _ in range(num_steps):
        log_weights = exponentiated_gradient_step(log_weights, gradient(log_ratios, np.exp(log_weights)), 0.5)
    return np.asarray(np.exp(log_weights))


def test_objective_and_gradient_equal_the_shared_vectors_at_the_probes(cases: list[dict[str, Any]]) -> None:
    """`objective` and `gradient` belong to the sampled table, `objective_exact` to the enumerated distributions."""
    num_probes = 0
    for case in cases:
        sampled = np.array(case["log_ratios_sampled"])
        for probe in case["probes"]:
            num_probes += 1
            weights = np.array(probe["weights"])
            assert objective(sampled, weights) == pytest.approx(probe["objective"], abs=1e-9), case["name"]
            np.testing.assert_allclose(gradient(sampled, weights), probe["gradient"], atol=1e-9, err_msg=case["name"])
            log_reference = np.array(case["log_ref"])
            ratios = np.array(case["log_policies"]) - log_reference[..., None]
            exact = np.logaddexp.reduce(log_reference + ratios @ weights, axis=1).mean()
            assert exact == pytest.approx(probe["objective_exact"], abs=1e-9), case["name"]
    assert num_probes >= 18


def test_objective_and_gap_equal_the_shared_vectors_at_the_optimum(cases: list[dict[str, Any]]) -> None:
    """F(λ*) is the vector's objective and gap(λ*) = 0, log-ratios of hundreds of nats included."""
    for case in cases:
        sampled, weights = np.array(case["log_ratios_sampled"]), np.array(case["weights"])
        assert objective(sampled, weights) == pytest.approx(case["objective"], abs=1e-9), case["name"]
        scale = max(1.0, float(np.abs(sampled).max()))
        assert gap(gradient(sampled, weights), weights) == pytest.approx(case["gap"], abs=1e-9 * scale), case["name"]


def test_the_reference_cancels_out_of_the_partition_function(exact: Array) -> None:
    """Z_λ(x) = E_ref exp(Σ_k λ_k ℓ_k) = Σ_y Π_k π_k(y|x)^λ_k (eqs. 2 and 6a)."""
    for weights in simplex_points(3):
        products = [np.logaddexp.reduce(World.random(seed).log_policies @ weights) for seed in range(4)]
        np.testing.assert_allclose(log_partition(exact, weights), products, atol=1e-12)


def test_tilted_samples_follow_the_sequence_level_mixture(exact: Array) -> None:
    """w_s = π_λ(y_s) where the samples are every response of an even reference (eq. 2)."""
    weights = np.array([0.2, 0.3, 0.5])
    mixtures = np.exp([World.random(seed).log_mixture(weights) for seed in range(4)])
    np.testing.assert_allclose(tilted_weights(exact, weights), mixtures, atol=1e-12)


def test_the_objective_is_zero_at_vertices_negative_inside_and_convex(exact: Array) -> None:
    """F(e_k) = 0, F ≤ 0 on the simplex, F((λ+μ)/2) ≤ (F(λ)+F(μ))/2 (design 2.2)."""
    assert [objective(exact, vertex) for vertex in np.eye(3)] == pytest.approx([0.0] * 3, abs=1e-12)
    points = simplex_points(3)
    assert all(objective(exact, point) < 0 for point in points)
    for one, other in zip(points[::2], points[1::2], strict=True):
        ends = (objective(exact, one) + objective(exact, other)) / 2
        assert objective(exact, (one + other) / 2) <= ends + 1e-12


def test_the_gradient_is_the_objectives_slope(exact: Array) -> None:
    """∂F/∂λ_k = E_x E_{π_λ}[ℓ_k] (eq. 4), against central differences."""
    step = 1e-5
    for weights in simplex_points(3, 5):
        slopes = [
            (objective(exact, weights + step * e) - objective(exact, weights - step * e)) / (2 * step)
            for e in np.eye(3)
        ]
        np.testing.assert_allclose(gradient(exact, weights), slopes, atol=1e-8)


def test_the_gap_bounds_the_distance_to_the_optimum(exact: Array) -> None:
    """gap(λ) ≥ F(λ) − F(λ*) (eq. 6)."""
    least = objective(exact, optimum(exact))
    for weights in simplex_points(3):
        assert gap(gradient(exact, weights), weights) >= objective(exact, weights) - least >= -1e-12


def test_at_an_interior_optimum_every_objective_gains_equally(exact: Array) -> None:
    """KKT: ∂F/∂λ_k is the same for all k with λ*_k > 0: the max–min balance the method promises."""
    weights = optimum(exact)
    assert weights.min() > 0.05
    gains = gradient(exact, weights)
    np.testing.assert_allclose(gains, gains.mean(), atol=1e-9)


def test_an_objective_left_out_of_the_optimum_gains_no_less(cases: list[dict[str, Any]]) -> None:
    """KKT: ∂F/∂λ_k ≥ the common value for k with λ*_k = 0."""
    case = next(case for case in cases if case["name"] == "boundary")
    weights = np.array(case["weights"])
    gains = gradient(np.array(case["log_ratios_sampled"]), weights)
    assert gains[weights == 0].min() >= gains[weights > 0].max() - 1e-9


def test_the_estimate_is_biased_low_and_less_so_with_more_samples() -> None:
    """E[log mean exp] < log E exp (Jensen), and the bias falls like 1/S."""
    world = World.random(0)
    weights, rng = np.array([0.6, 0.3, 0.1]), np.random.default_rng(0)
    truth = log_partition(world.log_ratios[None], weights)[0]
    biases = []
    for num_samples in (2, 8, 32):
        drawn = world.log_ratios[rng.integers(len(world.responses), size=(40_000, num_samples))]
        biases.append(log_partition(drawn, weights).mean() - truth)
    assert biases[0] < biases[1] < biases[2] < 0
    assert biases[1] / biases[2] == pytest.approx(4.0, rel=0.25)


def test_the_effective_sample_size_runs_from_one_to_all() -> None:
    """1/Σ w² is S for equal log-ratios, 1 where one sample outweighs the rest, (Σw)²/Σw² between."""
    equal = np.full((1, 5, 2), 3.0)
    dominated = np.zeros((1, 5, 2))
    dominated[0, 2] = 800.0
    doubled = np.zeros((1, 2, 2))
    doubled[0, 0] = np.log(2)
    sizes = [effective_sample_size(table, np.array([0.5, 0.5]))[0] for table in (equal, dominated, doubled)]
    assert sizes == pytest.approx([5.0, 1.0, 9 / 5])
