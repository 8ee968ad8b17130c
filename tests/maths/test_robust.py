"""The robust bound: the shared vectors, and what a minimum over a ball is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_ray.maths.robust import chi_step, dual_at, dual_moments, robust_bound
from mpo_ray.maths.simplex import Array


@pytest.fixture(scope="module")
def cases(shared: Path) -> list[dict[str, Any]]:
    return list(json.loads((shared / "vectors" / "mopo.json").read_text())["robust"])


def problem(seed: int, num: int = 12) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    log_reference = np.log(rng.dirichlet(np.ones(num)))
    return log_reference, rng.uniform(0, 2, num)


def test_every_shared_vector_is_met(cases: list[dict[str, Any]]) -> None:
    """The bound to 1e-8 and χ* to 1e-4 of itself, from radius 0 to one that holds the minimum."""
    for case in cases:
        found = robust_bound(np.array(case["log_ref"]), np.array(case["values"]), case["radius"])
        assert found.value == pytest.approx(case["lower_bound"], abs=1e-8)
        if case["chi"] is not None and case["chi"] > 1e-3:
            assert found.chi == pytest.approx(case["chi"], rel=1e-4)
    assert {case["radius"] for case in cases} >= {0.0, 1e-5, 0.15, 1.0}


@pytest.mark.parametrize("seed", range(8))
def test_no_distribution_within_the_radius_expects_less_and_the_worst_one_is_among_them(seed: int) -> None:
    """KL(Q*‖π_ref) = ε and E_{Q*}[v] is the bound; every other Q within the radius expects at least as much."""
    log_reference, values = problem(seed)
    reference = np.exp(log_reference)
    for radius in (1e-6, 1e-3, 0.05, 0.4):
        found = robust_bound(log_reference, values, radius)
        worst = reference * found.tilt
        assert worst.sum() == pytest.approx(1.0, abs=1e-12)
        assert float(worst @ values) == pytest.approx(found.value, abs=1e-10)
        assert float(worst @ np.log(np.maximum(found.tilt, 1e-300))) == pytest.approx(radius, rel=1e-6)
        rng = np.random.default_rng(seed)
        for _ in range(200):
            q = reference * np.exp(rng.normal(0, np.sqrt(radius), len(values)))
            q /= q.sum()
            if float(q @ np.log(q / reference)) <= radius:
                assert float(q @ values) >= found.value - 1e-12


def test_chi_grows_like_one_over_the_root_of_the_radius() -> None:
    """χ* √ε tends to the standard deviation of v over √2: a grid of χ with a ceiling would miss it (trap 3)."""
    log_reference, values = problem(0)
    reference = np.exp(log_reference)
    deviation = np.sqrt(reference @ (values - reference @ values) ** 2)
    for radius in (1e-6, 1e-8, 1e-10):
        chi = robust_bound(log_reference, values, radius).chi
        assert chi * np.sqrt(2 * radius) == pytest.approx(deviation, rel=5e-3)


@pytest.mark.parametrize("seed", range(4))
def test_the_dual_and_its_slope_follow_from_moments_that_average_over_batches(seed: int) -> None:
    """At χ* the dual is the bound and KL the radius; elsewhere it is below, and χ (KL − ε) its slope in log χ."""
    batches, radius, step = [problem(seed), problem(seed + 100)], 0.05, 1e-6
    log_reference = np.concatenate([log - np.log(2) for log, _ in batches])
    values = np.concatenate([v for _, v in batches])
    exact = robust_bound(log_reference, values, radius)

    def dual(log_chi: float) -> tuple[float, float]:
        return dual_at(np.mean([dual_moments(log, v, log_chi) for log, v in batches], axis=0), radius, log_chi)

    assert dual(np.log(exact.chi)) == pytest.approx((exact.value, radius), abs=1e-9)
    for log_chi in np.log(exact.chi) + np.array([-1.0, -0.1, 0.1, 1.0]):
        value, kl = dual(log_chi)
        assert value < exact.value
        slope = (dual(log_chi + step)[0] - dual(log_chi - step)[0]) / (2 * step)
        assert np.exp(log_chi) * (kl - radius) == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize("radius", [1e-5, 0.01, 0.3])
@pytest.mark.parametrize("start", [-6.0, 6.0])
def test_steps_of_chi_end_at_the_optimum_from_either_side(radius: float, start: float) -> None:
    log_reference, values = problem(1)
    exact = np.log(robust_bound(log_reference, values, radius).chi)
    log_chi = exact + start
    for _ in range(600):
        _, kl = dual_at(dual_moments(log_reference, values, log_chi), radius, log_chi)
        log_chi = chi_step(log_chi, kl, radius, 0.05)
    assert log_chi == pytest.approx(exact, abs=1e-6)


def test_steps_of_chi_come_to_rest_where_the_minimum_is_within_the_radius() -> None:
    """χ* = 0 there: the value ends within χ ε of the minimum, however long the steps go on."""
    log_reference, values = np.log([0.5, 0.3, 0.2]), np.array([0.4, 0.9, 1.7])
    log_chi, radius = 0.0, 1.0
    for _ in range(2000):
        value, kl = dual_at(dual_moments(log_reference, values, log_chi), radius, log_chi)
        log_chi = chi_step(log_chi, kl, radius, 0.1)
    assert robust_bound(log_reference, values, radius).value == pytest.approx(0.4)
    assert value == pytest.approx(0.4, abs=2e-3)


def test_a_near_tie_at_the_minimum_is_within_the_radius_too() -> None:
    """Two of four values are 0 to 1e-10: log 2 nats reach them both, and 1 nat is more than that."""
    found = robust_bound(np.log(np.full(4, 0.25)), np.array([0.0, 1e-10, 1.0, 2.0]), 1.0)
    assert found.value == pytest.approx(0.0, abs=1e-9)
    np.testing.assert_allclose(found.tilt, [2.0, 2.0, 0.0, 0.0], atol=0.2)


def test_equal_values_and_a_radius_that_holds_the_minimum() -> None:
    log_reference, values = problem(1)
    assert robust_bound(log_reference, np.full(12, 0.7), 0.3).value == pytest.approx(0.7, abs=1e-12)
    found = robust_bound(log_reference, values, 50.0)
    assert (found.value, found.chi) == (values.min(), 0.0)
    assert float(np.exp(log_reference) @ found.tilt) == pytest.approx(1.0)


@pytest.mark.parametrize("radius", [-0.1, np.nan, np.inf])
def test_a_radius_that_is_none_is_refused(radius: float) -> None:
    log_reference, values = problem(0)
    with pytest.raises(ValueError, match=r"radius: .* is no radius in KL divergence"):
        robust_bound(log_reference, values, radius)
