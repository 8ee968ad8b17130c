"""Which bounds a pool can meet: against the linear programme over all its policies, and in the words of a refusal."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from mpo_ray.maths.feasibility import LEAST_SLACK, InfeasibleBoundsError, check_feasible, feasibility
from mpo_ray.maths.pool import Pool
from mpo_ray.maths.simplex import Array


def pool(seed: int, num_secondary: int) -> Pool:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 7, 15)
    return Pool.of_samples(
        rng.uniform(size=sizes.sum()), rng.uniform(size=(sizes.sum(), num_secondary)), np.cumsum([0, *sizes])
    )


def programme(pool: Pool, cost: Array, rows: Array, limits: Array, num_free: int) -> float | None:
    """The primal: one unknown for each candidate, and free ones at the end."""
    num = len(pool.primary)
    owner = np.repeat(np.arange(pool.num_prompts), np.diff(pool.starts))
    sums = np.zeros((pool.num_prompts, num + num_free))
    sums[owner, np.arange(num)] = 1.0
    box = [(0.0, None)] * num + [(None, None)] * num_free
    found = linprog(cost, A_ub=rows, b_ub=limits, A_eq=sums, b_eq=np.ones(pool.num_prompts), bounds=box)
    return None if found.status else -float(found.fun)


def largest_slack(pool: Pool, bounds: Array) -> float:
    means = pool.secondary.T / pool.num_prompts
    cost = np.concatenate([np.zeros(len(pool.primary)), [-1.0]])
    found = programme(pool, cost, np.column_stack([-means, np.ones(len(bounds))]), -bounds, 1)
    assert found is not None
    return found


@pytest.mark.parametrize("seed", range(12))
def test_slack_and_largest_bounds_are_those_of_the_programme_over_all_policies(seed: int) -> None:
    num = 1 + seed % 3
    given = pool(seed, num)
    best = np.maximum.reduceat(given.secondary, given.starts[:-1], axis=0).mean(axis=0)
    for share in (0.75, 0.9, 0.99, 1.02):
        bounds = share * best
        found, slack = feasibility(given, bounds), largest_slack(given, bounds)
        np.testing.assert_allclose(found.best, best)
        if slack >= LEAST_SLACK:
            assert found.worst is None
            assert LEAST_SLACK <= found.slack <= slack + 1e-8
            continue
        assert found.slack == pytest.approx(slack, abs=1e-8)
        means = given.secondary.T / given.num_prompts
        for j in range(num):
            others = np.arange(num) != j
            expected = programme(given, -means[j], -means[others], -bounds[others], 0) if num > 1 else best[j]
            np.testing.assert_allclose(found.largest[j], np.nan if expected is None else expected, atol=1e-7)


def test_bounds_that_only_exclude_one_another_are_refused_with_the_largest_that_the_others_leave() -> None:
    """Two opposed objectives: q̄_2 = 1 − q̄_1. Each alone reaches 0.9; together they sum to 1."""
    first = np.tile([0.1, 0.9], 4)
    opposed = Pool.of_samples(first, np.column_stack([first, 1 - first]), np.arange(5) * 2)
    check_feasible(opposed, np.array([0.55, 0.4]), ["safe", "short"])
    with pytest.raises(InfeasibleBoundsError) as caught:
        check_feasible(opposed, np.array([0.5, 0.7]), ["safe", "short"])
    assert str(caught.value) == (
        "bound safe ≥ 0.5000 cannot be met: the best that any policy on this pool reaches is 0.9000, and with short ≥ "
        "0.7000 it is 0.3000. Lower the bound, or add better candidates to the pool."
    )


def test_others_that_cannot_be_met_by_themselves_are_said_so() -> None:
    first = np.tile([0.1, 0.9], 4)
    opposed = Pool.of_samples(first, np.column_stack([first, 1 - first, first]), np.arange(5) * 2)
    with pytest.raises(
        InfeasibleBoundsError, match=r"bound c ≥ 0.9900 .* and a ≥ 0.8000, b ≥ 0.8000 cannot be met tog"
    ):
        check_feasible(opposed, np.array([0.8, 0.8, 0.99]), ["a", "b", "c"])


def test_without_bounds_everything_is_feasible() -> None:
    assert feasibility(pool(0, 0), np.zeros(0)).worst is None
