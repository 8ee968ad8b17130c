"""The partition function, its objective and gradient: the shared vectors, and the theorems of design 2.2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_ray.maths.partition import (
    effective_sample_size,
    expectation,
    gap,
    gradient,
    log_partition,
    moments,
    objective,
    tilted_weights,
)
from mpo_ray.maths.sample_table import SampleTable, log_proposal
from mpo_ray.maths.simplex import exponentiated_gradient_step, uniform
from tests.world import Array, World


@pytest.fixture(scope="module")
def cases(shared: Path) -> list[dict[str, Any]]:
    return list(json.loads((shared / "vectors" / "mpo.json").read_text())["cases"])


@pytest.fixture(scope="module")
def exact() -> SampleTable:
    """Every response of four worlds whose reference is even, once each, so that means over them are exact."""
    return SampleTable.of_reference(np.stack([World.random(seed).log_ratios for seed in range(4)]))


def simplex_points(num_objectives: int, num_points: int = 30) -> Array:
    return np.random.default_rng(0).dirichlet(np.ones(num_objectives), size=num_points)


def optimum(table: SampleTable, num_steps: int = 3000) -> Array:
    """λ* by mirror steps with the full gradient, which is small where F is as smooth as in these worlds."""
    log_weights = np.log(uniform(table.num_objectives))
    for _ in range(num_steps):
        log_weights = exponentiated_gradient_step(log_weights, gradient(table, np.exp(log_weights)), 0.5)
    return np.asarray(np.exp(log_weights))


def test_objective_and_gradient_equal_the_shared_vectors_at_the_probes(cases: list[dict[str, Any]]) -> None:
    """`objective` and `gradient` belong to the sampled table, `objective_exact` to the enumerated distributions."""
    num_probes = 0
    for case in cases:
        sampled = SampleTable.of_reference(np.array(case["log_ratios_sampled"]))
        for probe in case["probes"]:
            num_probes += 1
            weights = np.array(probe["weights"])
            assert objective(sampled, weights) == pytest.approx(probe["objective"], abs=1e-10), case["name"]
            np.testing.assert_allclose(gradient(sampled, weights), probe["gradient"], atol=1e-10, err_msg=case["name"])
            log_reference = np.array(case["log_ref"])
            ratios = np.array(case["log_policies"]) - log_reference[..., None]
            exact = np.logaddexp.reduce(log_reference + ratios @ weights, axis=1).mean()
            assert exact == pytest.approx(probe["objective_exact"], abs=1e-10), case["name"]
    assert num_probes >= 18


def test_objective_and_gap_equal_the_shared_vectors_at_the_optimum(cases: list[dict[str, Any]]) -> None:
    """F(λ*) is the vector's objective and gap(λ*) = 0, log-ratios of hundreds of nats included."""
    for case in cases:
        sampled, weights = SampleTable.of_reference(np.array(case["log_ratios_sampled"])), np.array(case["weights"])
        assert objective(sampled, weights) == pytest.approx(case["objective"], abs=1e-10), case["name"]
        scale = max(1.0, float(np.abs(sampled.log_ratios).max()))
        assert gap(gradient(sampled, weights), weights) == pytest.approx(case["gap"], abs=1e-9 * scale), case["name"]


def test_the_reference_cancels_out_of_the_partition_function(exact: SampleTable) -> None:
    """Z_λ(x) = E_ref exp(Σ_k λ_k ℓ_k) = Σ_y Π_k π_k(y|x)^λ_k (eqs. 2 and 6a)."""
    for weights in simplex_points(3):
        products = [np.logaddexp.reduce(World.random(seed).log_policies @ weights) for seed in range(4)]
        np.testing.assert_allclose(log_partition(exact, weights), products, atol=1e-12)


def test_tilted_samples_follow_the_sequence_level_mixture(exact: SampleTable) -> None:
    """w_s = π_λ(y_s) where the samples are every response of an even reference (eq. 2)."""
    weights = np.array([0.2, 0.3, 0.5])
    mixtures = np.exp([World.random(seed).log_mixture(weights) for seed in range(4)])
    np.testing.assert_allclose(tilted_weights(exact, weights).reshape(4, -1), mixtures, atol=1e-12)


def test_the_objective_is_zero_at_vertices_negative_inside_and_convex(exact: SampleTable) -> None:
    """F(e_k) = 0, F ≤ 0 on the simplex, F((λ+μ)/2) ≤ (F(λ)+F(μ))/2 (design 2.2)."""
    assert [objective(exact, vertex) for vertex in np.eye(3)] == pytest.approx([0.0] * 3, abs=1e-12)
    points = simplex_points(3)
    assert all(objective(exact, point) < 0 for point in points)
    for one, other in zip(points[::2], points[1::2], strict=True):
        ends = (objective(exact, one) + objective(exact, other)) / 2
        assert objective(exact, (one + other) / 2) <= ends + 1e-12


def test_the_gradient_is_the_objectives_slope(exact: SampleTable) -> None:
    """∂F/∂λ_k = E_x E_{π_λ}[ℓ_k] (eq. 4), against central differences."""
    step = 1e-5
    for weights in simplex_points(3, 5):
        slopes = [
            (objective(exact, weights + step * e) - objective(exact, weights - step * e)) / (2 * step)
            for e in np.eye(3)
        ]
        np.testing.assert_allclose(gradient(exact, weights), slopes, atol=1e-8)


def test_the_gap_bounds_the_distance_to_the_optimum(exact: SampleTable) -> None:
    """gap(λ) ≥ F(λ) − F(λ*) (eq. 6)."""
    least = objective(exact, optimum(exact))
    for weights in simplex_points(3):
        assert gap(gradient(exact, weights), weights) >= objective(exact, weights) - least >= -1e-12


def test_at_an_interior_optimum_every_objective_gains_equally(exact: SampleTable) -> None:
    """KKT: ∂F/∂λ_k is the same for all k with λ*_k > 0: the max–min balance the method promises."""
    weights = optimum(exact)
    assert weights.min() > 0.05
    gains = gradient(exact, weights)
    np.testing.assert_allclose(gains, gains.mean(), atol=1e-9)


def test_an_objective_left_out_of_the_optimum_gains_no_less(cases: list[dict[str, Any]]) -> None:
    """KKT: ∂F/∂λ_k ≥ the common value for k with λ*_k = 0."""
    case = next(case for case in cases if case["name"] == "boundary")
    weights = np.array(case["weights"])
    gains = gradient(SampleTable.of_reference(np.array(case["log_ratios_sampled"])), weights)
    assert gains[weights == 0].min() >= gains[weights > 0].max() - 1e-9


def test_the_estimate_is_biased_low_and_less_so_with_more_samples() -> None:
    """E[log mean exp] < log E exp (Jensen), and the bias falls like 1/S."""
    world = World.random(0)
    weights, rng = np.array([0.6, 0.3, 0.1]), np.random.default_rng(0)
    truth = log_partition(SampleTable.of_reference(world.log_ratios[None]), weights)[0]
    biases = []
    for num_samples in (2, 8, 32):
        drawn = world.log_ratios[rng.integers(len(world.responses), size=(40_000, num_samples))]
        biases.append(objective(SampleTable.of_reference(drawn), weights) - truth)
    assert biases[0] < biases[1] < biases[2] < 0
    assert biases[1] / biases[2] == pytest.approx(4.0, rel=0.25)


def test_the_effective_sample_size_runs_from_one_to_all() -> None:
    """1/Σ w² is S for equal log-ratios, 1 where one sample outweighs the rest, (Σw)²/Σw² between."""
    equal = np.full((1, 5, 2), 3.0)
    dominated = np.zeros((1, 5, 2))
    dominated[0, 2] = 800.0
    doubled = np.zeros((1, 2, 2))
    doubled[0, 0] = np.log(2)
    sizes = [
        effective_sample_size(SampleTable.of_reference(table), np.array([0.5, 0.5]))[0]
        for table in (equal, dominated, doubled)
    ]
    assert sizes == pytest.approx([5.0, 1.0, 9 / 5])


def balanced(world: World, counts: list[int], rng: np.random.Generator) -> SampleTable:
    """One prompt: counts[0] responses of the reference, counts[k + 1] of policy k, with log p̄/π_ref of them all."""
    models = [world.log_reference, *world.log_policies.T]
    drawn = np.concatenate(
        [rng.choice(len(world.responses), size=n, p=np.exp(m)) for n, m in zip(counts, models, strict=True)]
    )
    ratios = world.log_ratios[drawn]
    proposals = np.hstack([np.zeros((len(drawn), 1)), ratios])
    share = log_proposal(proposals, np.tile(np.array(counts, dtype=float), (len(drawn), 1)))
    return SampleTable(ratios, share, np.array([0, len(drawn)]))


@pytest.mark.parametrize("counts", [[0, 1, 1, 1], [2, 1, 1, 1], [3, 0, 0, 0], [1, 4, 0, 0]])
def test_the_estimate_of_z_is_unbiased_for_every_weight_whoever_drew(counts: list[int]) -> None:
    """E Ẑ_λ = Z_λ (eq. 6a): Σ over proposals of (n_j/N) Σ_y π_j(y) w_λ(y) = Σ_y Π_k π_k(y)^λ_k, by enumeration."""
    world = World.random(0, spread=2.0)
    models = np.column_stack([world.log_reference, world.log_policies])
    ratios = np.hstack([np.zeros((len(world.responses), 1)), world.log_ratios])
    number = np.tile(np.array(counts, dtype=float), (len(world.responses), 1))
    proposal = log_proposal(ratios, number)
    for weights in [*simplex_points(3, 20), *np.eye(3)]:
        w = np.exp(world.log_ratios @ weights - proposal)
        mean = sum(n * (np.exp(models[:, j]) * w).sum() for j, n in enumerate(counts)) / sum(counts)
        assert mean == pytest.approx(np.exp(world.log_policies @ weights).sum(), abs=1e-12)


def test_the_balanced_weights_never_exceed_the_number_of_policies() -> None:
    """Π_k π_k^λ_k ≤ Σ_k λ_k π_k ≤ K p̄ for equal n_k (eq. 6a), and with π_ref's samples alone there is no bound."""
    world = World.random(3, spread=4.0)
    equal = log_proposal(world.log_ratios, np.ones((len(world.responses), 3)))
    points = [*simplex_points(3, 200), *np.eye(3)]
    largest = max(float(np.exp(world.log_ratios @ weights - equal).max()) for weights in points)
    assert 1.0 < largest <= 3.0 + 1e-9
    assert max(float(np.exp(world.log_ratios @ weights).max()) for weights in points) > 6.0


def test_samples_of_the_policies_estimate_the_partition_function_where_the_references_fail() -> None:
    """Far from the reference, log Ẑ of N policies' samples errs less than of N reference samples (design 2.2)."""
    world, rng = World.random(5, spread=4.0), np.random.default_rng(0)
    weights = np.array([0.5, 0.3, 0.2])
    truth = np.logaddexp.reduce(world.log_policies @ weights)
    errors = {
        name: np.mean([abs(log_partition(balanced(world, counts, rng), weights)[0] - truth) for _ in range(400)])
        for name, counts in {"paper": [12, 0, 0, 0], "balanced": [0, 4, 4, 4]}.items()
    }
    assert errors["balanced"] < 0.6 * errors["paper"]


def test_an_expectation_under_the_mixture_tends_to_the_enumerated_one() -> None:
    """E_{π_λ}[v] ≈ Σ w v / Σ w, and λ = 0 is the reference."""
    world, rng = World.random(1), np.random.default_rng(0)
    values = rng.normal(size=(len(world.responses), 2))
    drawn = balanced(world, [0, 60_000, 60_000, 60_000], rng)
    rows = [{tuple(r): i for i, r in enumerate(world.log_ratios)}[tuple(r)] for r in drawn.log_ratios]
    for weights, truth in (
        (np.array([0.1, 0.6, 0.3]), np.exp(world.log_mixture(np.array([0.1, 0.6, 0.3]))) @ values),
        (np.zeros(3), np.exp(world.log_reference) @ values),
    ):
        np.testing.assert_allclose(expectation(drawn, weights, values[rows])[0], truth, atol=0.02)


def ragged(seed: int, numbers: list[int]) -> SampleTable:
    rng = np.random.default_rng(seed)
    rows = sum(numbers)
    return SampleTable(rng.normal(size=(rows, 3)), 0.3 * rng.normal(size=rows), np.cumsum([0, *numbers]))


@pytest.mark.parametrize("table", [ragged(0, [4, 4, 4, 4]), ragged(1, [2, 7, 3, 5])], ids=["even", "ragged"])
def test_the_moments_are_the_derivatives_at_every_point_and_for_every_share_of_prompts(table: SampleTable) -> None:
    """F_D, ∇F_D and ∇²F_D of weighted prompts, against sums prompt by prompt and central differences."""
    points = simplex_points(3, 4)
    shares = np.random.default_rng(2).dirichlet(np.ones(4), size=4)
    found = moments(table, points, shares)

    def single(point: Array, share: Array) -> float:
        return float(share @ log_partition(table, point))

    def slope(point: Array, share: Array) -> Array:
        steps = 1e-5 * np.eye(3)
        return np.array([(single(point + s, share) - single(point - s, share)) / 2e-5 for s in steps])

    for d, (point, share) in enumerate(zip(points, shares, strict=True)):
        assert found.objective[d] == pytest.approx(single(point, share), abs=1e-12)
        np.testing.assert_allclose(found.gradient[d], slope(point, share), atol=1e-8)
        curvature = [(slope(point + 1e-3 * e, share) - slope(point - 1e-3 * e, share)) / 2e-3 for e in np.eye(3)]
        np.testing.assert_allclose(found.hessian[d], curvature, atol=1e-5)


def test_a_table_in_blocks_gives_what_it_gives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are whole prompts, whatever their size."""
    table, weights = ragged(1, [2, 7, 3, 5, 2]), np.array([0.2, 0.3, 0.5])
    whole = (gradient(table, weights), tilted_weights(table, weights), effective_sample_size(table, weights))
    monkeypatch.setattr("mpo_ray.maths.partition.BLOCK_ROWS", 4)
    assert len(list(table.blocks(4))) == 5
    split = (gradient(table, weights), tilted_weights(table, weights), effective_sample_size(table, weights))
    for one, other in zip(whole, split, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-14)
