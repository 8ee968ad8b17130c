"""The constrained optimum on a pool: the shared vectors, the conditions of optimality, and the traps of design 2.4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_ray.maths.constrained import (
    RunawayError,
    Solution,
    barrier_multipliers,
    barrier_step,
    dual,
    multiplier_step,
    ratio,
    scheduled_bounds,
    solve_barrier,
    solve_lagrangian,
)
from mpo_ray.maths.feasibility import InfeasibleBoundsError, check_feasible
from mpo_ray.maths.pool import Pool
from mpo_ray.maths.robust import robust_bound
from mpo_ray.maths.simplex import Array

TAU = 0.08


@pytest.fixture(scope="module")
def vectors(shared: Path) -> dict[str, Any]:
    return dict(json.loads((shared / "vectors" / "mopo.json").read_text()))


def pool_of(case: dict[str, Any]) -> Pool:
    primary, secondary = np.array(case["p_bar"]), np.array(case["q_bar"])
    prompts, size = primary.shape
    rows = secondary.reshape(prompts * size, -1)
    return Pool(primary.ravel(), rows, np.array(case["log_ref"]).ravel(), np.arange(prompts + 1) * size)


def random_pool(seed: int, num_secondary: int = 2, opposed: float = 0.6) -> Pool:
    """Prompts with 3 to 8 candidates each; the secondaries oppose the primary more or less."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 9, 20)
    primary = rng.uniform(size=sizes.sum())
    noise = rng.uniform(size=(len(primary), num_secondary))
    return Pool.of_samples(primary, opposed * (1 - primary[:, None]) + (1 - opposed) * noise, np.cumsum([0, *sizes]))


def value(pool: Pool, rho: Array, tau: float) -> float:
    """E[ρ p̄] − τ KL."""
    return float(pool.expectation(rho * pool.primary - tau * rho * np.log(np.maximum(rho, 1e-300))))


def test_every_feasible_shared_vector_is_solved(vectors: dict[str, Any]) -> None:
    """Multipliers, primary, secondary, KL and ρ to 1e-5, the dual's value to 1e-9."""
    for case in vectors["cases"]:
        if case.get("infeasible"):
            continue
        found = solve_lagrangian(pool_of(case), np.array(case["bounds"]), tau=case["tau"])
        np.testing.assert_allclose(found.multipliers, case["multipliers"], atol=1e-5, err_msg=case["name"])
        np.testing.assert_allclose(found.secondary, case["secondary"], atol=1e-5, err_msg=case["name"])
        np.testing.assert_allclose(found.ratio, np.ravel(case["rho"]), atol=1e-5, err_msg=case["name"])
        assert (found.primary, found.kl) == pytest.approx((case["primary"], case["kl"]), abs=1e-5), case["name"]
        assert found.dual_value == pytest.approx(case["dual_value"], abs=1e-9), case["name"]
        assert found.residual < 1e-9, case["name"]


def test_every_infeasible_shared_vector_is_refused_with_its_objective(vectors: dict[str, Any]) -> None:
    """The bound that exceeds what any policy reaches is the one that is named, with what can be reached."""
    refused = 0
    for case in vectors["cases"]:
        pool, bounds = pool_of(case), np.array(case["bounds"])
        names = [f"objective {j}" for j in range(len(bounds))]
        if not case.get("infeasible"):
            check_feasible(pool, bounds, names)
            continue
        best = np.maximum.reduceat(pool.secondary, pool.starts[:-1], axis=0).mean(axis=0)
        worst = int((bounds - best).argmax())
        with pytest.raises(InfeasibleBoundsError) as caught:
            check_feasible(pool, bounds, names)
        assert f"bound objective {worst} ≥ {bounds[worst]:.4f} cannot be met" in str(caught.value)
        assert f"reaches is {best[worst]:.4f}" in str(caught.value)
        refused += 1
    assert refused == 4


def test_every_barrier_vector_is_solved(vectors: dict[str, Any]) -> None:
    problems = {case["name"]: case for case in vectors["cases"]}
    for case in vectors["barrier"]:
        given = problems[case["problem"]]
        found = solve_barrier(pool_of(given), np.array(given["bounds"]), tau=given["tau"], sigma=case["sigma"])
        np.testing.assert_allclose(found.multipliers, case["multipliers"], atol=1e-5)
        np.testing.assert_allclose(found.secondary, case["secondary"], atol=1e-5)
        assert (found.primary, found.kl) == pytest.approx((case["primary"], case["kl"]), abs=1e-5)
        assert found.residual < 1e-8


def test_the_ratio_averages_to_one_under_the_reference_for_every_prompt() -> None:
    """Trap 1: the paper's exponent has a −1 and no normalisation."""
    pool = random_pool(0)
    rho = ratio(pool, np.array([0.7, 0.2]), TAU)
    means = np.add.reduceat(np.exp(pool.log_reference) * rho, pool.starts[:-1])
    np.testing.assert_allclose(means, 1.0, atol=1e-12)
    assert rho.max() > 2.0


def test_the_slope_of_the_dual_is_the_slack_of_the_bounds() -> None:
    """∂g/∂λ_j = E_ref[ρ q̄_j] − b_j, by differences."""
    pool, bounds, at = random_pool(1), np.array([0.5, 0.4]), np.array([0.3, 0.6])
    slope = dual(pool, at, bounds, TAU)[1]
    np.testing.assert_allclose(
        slope, pool.expectation(ratio(pool, at, TAU)[:, None] * pool.secondary) - bounds, atol=1e-12
    )
    for j in range(2):
        move = 1e-5 * np.eye(2)[j]
        difference = dual(pool, at + move, bounds, TAU)[0] - dual(pool, at - move, bounds, TAU)[0]
        assert slope[j] == pytest.approx(difference / 2e-5, abs=1e-8)


def other_policies(pool: Pool, num: int, seed: int) -> list[Array]:
    """Random ρ ≥ 0 that average to 1 over each prompt."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(pool.num_prompts), np.diff(pool.starts))
    found = []
    for _ in range(num):
        rho = rng.exponential(size=len(pool.primary)) ** rng.uniform(0.2, 3)
        found.append(rho / np.add.reduceat(np.exp(pool.log_reference) * rho, pool.starts[:-1])[owner])
    return found


@pytest.mark.parametrize("seed", range(5))
def test_no_policy_that_meets_the_bounds_does_better(seed: int) -> None:
    """E[ρ p̄] − τ KL of the solution is the dual's value, and no feasible mixture of it with another policy is above."""
    pool = random_pool(seed)
    bounds = np.array([0.52, 0.5])
    found = solve_lagrangian(pool, bounds, tau=TAU)
    assert value(pool, found.ratio, TAU) == pytest.approx(found.dual_value, abs=1e-9)
    compared = 0
    for other in other_policies(pool, 300, seed):
        for share in (0.02, 0.3):
            rho = (1 - share) * found.ratio + share * other
            if (pool.expectation(rho[:, None] * pool.secondary) >= bounds).all():
                assert value(pool, rho, TAU) <= found.dual_value + 1e-12
                compared += 1
    assert compared > 20


def robust_values(pool: Pool, found: Solution, bounds: Array) -> None:
    assert found.residual < 1e-7
    assert (found.robust >= bounds - 1e-7).all()
    assert value(pool, found.ratio, TAU) == pytest.approx(found.dual_value, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_with_a_radius_the_robust_bounds_hold_and_the_saddle_is_certified(seed: int) -> None:
    """Primal = dual value: ρ is best against the worst Q, and Q is worst for ρ; slack remains without the adversary."""
    pool, bounds = random_pool(seed), np.array([0.48, 0.46])
    plain = solve_lagrangian(pool, bounds, tau=TAU)
    for radius in (1e-4, 1e-3, 5e-3):
        found = solve_lagrangian(pool, bounds, tau=TAU, radius=radius)
        robust_values(pool, found, bounds)
        assert (found.secondary > bounds).all()
        assert found.primary < plain.primary
        for other in other_policies(pool, 100, seed):
            rho = 0.95 * found.ratio + 0.05 * other
            if value(pool, rho, TAU) > found.dual_value + 1e-9:
                worst = [robust_bound(pool.joint_log_reference, rho * q, radius).value for q in pool.secondary.T]
                assert (np.array(worst) < bounds + 1e-9).any()


def test_an_adversary_that_has_something_left_to_gain_is_seen_in_the_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a single round Q is not the worst for ρ: the certificate says so."""
    monkeypatch.setattr("mpo_ray.maths.constrained.MAX_ROUNDS", 1)
    found = solve_lagrangian(random_pool(1), np.array([0.48, 0.46]), tau=TAU, radius=5e-3)
    assert found.residual > 1e-4


def test_a_radius_that_no_slack_can_pay_for_is_refused_with_an_explanation() -> None:
    """Trap 2: ε = 0.15 on a few candidates per prompt costs more than any policy has; λ would run away."""
    pool = random_pool(0)
    bounds = pool.expectation(pool.secondary)
    with pytest.raises(
        RunawayError, match=r"bound [01]: its multiplier reached .* Lower the bound or the radius, or add"
    ):
        solve_lagrangian(pool, bounds, tau=TAU, radius=0.15)


def test_objectives_that_agree_leave_nothing_to_trade() -> None:
    """Trap 6: with q̄ = p̄ and a bound at parity, λ = 0 and ρ is that of the primary objective alone."""
    pool = random_pool(3, opposed=0.0)
    agreeing = Pool(pool.primary, pool.primary[:, None], pool.log_reference, pool.starts)
    found = solve_lagrangian(agreeing, np.array([0.5]), tau=TAU)
    assert found.multipliers.tolist() == [0.0]
    np.testing.assert_allclose(found.ratio, ratio(agreeing, np.zeros(1), TAU))


@pytest.mark.parametrize("seed", range(3))
def test_the_barrier_tends_to_the_lagrangian_and_keeps_inside_the_bounds(seed: int) -> None:
    """λ_j (G_j − b_j) = σ: strictly inside for every σ, and at the Lagrangian's optimum as σ → 0."""
    pool, bounds = random_pool(seed), np.array([0.5, 0.49])
    limit = solve_lagrangian(pool, bounds, tau=TAU)
    gaps = []
    for sigma in (1e-2, 1e-3, 1e-4):
        found = solve_barrier(pool, bounds, tau=TAU, sigma=sigma, delta=1e-6)
        assert (found.secondary > bounds).all()
        np.testing.assert_allclose(found.multipliers * (found.secondary - bounds), sigma, rtol=1e-4)
        np.testing.assert_allclose(
            barrier_multipliers(found.secondary, bounds, sigma, 1e-6), found.multipliers, rtol=1e-4
        )
        gaps.append(limit.dual_value - value(pool, found.ratio, TAU))
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < 5e-4
    robust_values_of_barrier = solve_barrier(pool, bounds, tau=TAU, sigma=1e-3, radius=1e-4)
    assert robust_values_of_barrier.residual < 1e-6
    assert (robust_values_of_barrier.robust > bounds).all()


def test_below_delta_the_barrier_goes_on_linearly() -> None:
    """At an infeasible point λ is held at σ/δ, not infinite: the pull back stays finite."""
    values, bounds = np.array([0.3, 0.62]), np.array([0.5, 0.5])
    np.testing.assert_allclose(barrier_multipliers(values, bounds, 0.01, 0.05), [0.2, 0.01 / 0.12])
    pool = random_pool(0)
    too_high = np.maximum.reduceat(pool.secondary, pool.starts[:-1], axis=0).mean(axis=0) + 0.05
    found = solve_barrier(pool, too_high, tau=TAU, sigma=0.01, delta=0.05)
    np.testing.assert_allclose(found.multipliers, 0.2)


def test_stochastic_steps_find_the_exact_multipliers() -> None:
    """λ ← [λ − η (G − b)]₊ with G of random prompts: the average comes within 0.05 of the dual's minimiser."""
    pool, bounds = random_pool(2), np.array([0.5, 0.45])
    exact = solve_lagrangian(pool, bounds, tau=TAU).multipliers
    rng, multipliers, total = np.random.default_rng(0), np.zeros(2), np.zeros(2)
    means = np.stack([np.exp(pool.log_reference)] * 2, axis=1) * pool.secondary
    for t in range(1, 4001):
        prompts = rng.integers(0, pool.num_prompts, 8)
        weighed = np.add.reduceat(ratio(pool, multipliers, TAU)[:, None] * means, pool.starts[:-1], axis=0)
        multipliers = multiplier_step(multipliers, weighed[prompts].mean(axis=0), bounds, 0.5 / np.sqrt(t))
        total += multipliers if t > 2000 else 0.0
    np.testing.assert_allclose(total / 2000, exact, atol=0.05)
    assert exact.max() > 0.1


def test_a_multiplier_never_falls_below_zero_and_bounds_follow_what_was_reached() -> None:
    np.testing.assert_allclose(
        multiplier_step(np.array([0.1, 0.1]), np.array([0.9, 0.4]), np.array([0.5, 0.5]), 1.0), [0.0, 0.2]
    )
    np.testing.assert_allclose(scheduled_bounds(np.array([0.6, 0.5]), 0.99), [0.594, 0.495])


@pytest.mark.parametrize("tau", [0.0, -0.1, np.nan])
def test_a_temperature_that_is_none_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match=r"tau: .* is no strength of the KL penalty"):
        solve_lagrangian(random_pool(0), np.array([0.5, 0.5]), tau=tau)


@pytest.mark.parametrize(("sigma", "delta", "named"), [(0.0, 0.1, "sigma"), (0.1, -1.0, "delta")])
def test_a_barrier_that_is_none_is_refused(sigma: float, delta: float, named: str) -> None:
    with pytest.raises(ValueError, match=rf"{named}: .* is not above 0"):
        solve_barrier(random_pool(0), np.array([0.5, 0.5]), tau=TAU, sigma=sigma, delta=delta)


def test_barrier_steps_rest_where_the_formula_says_and_are_lagrangian_steps_without_a_barrier() -> None:
    """λ = σ/max(G − b, δ) for every G; and σ → 0 leaves [λ − η (G − b)]₊."""
    values, bounds = np.array([0.6, 0.52, 0.4]), np.array([0.5, 0.5, 0.5])
    multipliers = np.zeros(3)
    for _ in range(2000):
        multipliers = barrier_step(multipliers, values, bounds, 2.0, sigma=0.01, delta=0.005)
    assert multipliers == pytest.approx(barrier_multipliers(values, bounds, 0.01, 0.005), rel=1e-6)
    start = np.array([0.1, 0.3, 0.2])
    plain = multiplier_step(start, values, bounds, 2.0)
    assert barrier_step(start, values, bounds, 2.0, sigma=1e-14, delta=1e-20) == pytest.approx(plain, abs=1e-6)
