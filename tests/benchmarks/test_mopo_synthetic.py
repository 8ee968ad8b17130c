"""The synthetic fronts: exact solutions lie on them, and what is learned from labels comes nearer with more labels."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from mopo_lag import figures_of, trained
from mopo_synthetic import STRUCTURES, TAU, below_front, bounds_of, estimated, exact_distance, structure, updates

from mpo_ray.maths.constrained import solve_lagrangian


@pytest.mark.parametrize("name", STRUCTURES)
def test_exact_solutions_lie_on_the_front(name: str) -> None:
    """The primal value at every bound is the dual's upper bound, to 1e-6; the bounds hold."""
    assert exact_distance(structure(name, 0).pool) < 1e-6


def test_the_intransitive_structure_has_a_cycle() -> None:
    """Three responses of three groups, each of which beats the next."""
    wins = structure("intransitive", 0).wins[0, 1]
    assert any(
        min(wins[i, j], wins[j, k], wins[k, i]) > 0.7
        for i in range(len(wins))
        for j in range(len(wins))
        for k in range(len(wins))
    )


@pytest.mark.parametrize("variant", ["lagrangian", "barrier"])
def test_more_labels_bring_the_policy_nearer_to_the_front_and_to_its_bound(variant: str) -> None:
    """From 200 to 20,000 pairs the distance below the front falls fourfold or more; the bound is met to 0.02."""
    given = structure("partly conflicting", 0)
    bounds = bounds_of(given.pool, 0.0)
    found = []
    for number in (200, 20_000):
        rng = np.random.default_rng(0)
        rho = updates(estimated(given, number, rng), bounds, variant, rng)
        missed = float((bounds - given.pool.expectation(rho[:, None] * given.pool.secondary)).max())
        found.append((below_front(given.pool, rho), missed))
    assert found[1][0] < found[0][0] / 4
    assert found[1][1] < 0.02
    exact = solve_lagrangian(given.pool, bounds, tau=TAU)
    assert exact.multipliers[0] > 0.1, "the bound binds, or there was nothing to find"


def test_a_schedule_that_relaxes_often_loses_the_bound_and_none_keeps_it() -> None:
    """Opposed objectives: what is bounded falls to its least with t0 = 20 and 0.9, and stays with t0 = ∞."""
    pool = structure("opposed", 0).pool
    lost, kept = (figures_of(pool, trained(pool, lag=lag, relaxation=0.9, seed=0))[1:] for lag in (20, None))
    assert kept == pytest.approx((0.0, 0.0), abs=0.02)
    least = float(pool.secondary.reshape(pool.num_prompts, -1).min(axis=1).mean())
    assert lost[0] == pytest.approx(least - float(pool.expectation(pool.secondary)[0]), abs=0.02)
    assert lost[1] > 1.0
