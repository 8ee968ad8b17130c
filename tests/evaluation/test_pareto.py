"""The front and the hypervolume, against their definitions; and which points they are taken over."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from mpo_ray.config import Evaluation
from mpo_ray.evaluation.candidates import Candidate, grid_candidates
from mpo_ray.evaluation.pareto import Pareto, Point, compare_points, families_of, hypervolume, nondominated
from tests.evaluation.world import ALL_KINDS, OBJECTIVES, Tendency, completions, records, with_front


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a >= b).all() and (a > b).any())


def is_corner(point: Point) -> bool:
    """Whether a point of the grid is a policy, which is among the named candidates too."""
    return max(point.weights.values()) == 1.0


@pytest.mark.parametrize("num_objectives", [2, 3, 4])
def test_the_front_is_what_no_point_dominates(num_objectives):
    """By the definition, pair by pair, with equal points and equal coordinates among them."""
    points = np.random.default_rng(num_objectives).integers(0, 5, (40, num_objectives)) / 4
    names = [f"p{i}" for i in range(len(points))]
    expected = [n for n, p in zip(names, points, strict=True) if not any(dominates(q, p) for q in points)]
    assert nondominated(dict(zip(names, points, strict=True))) == expected


def test_the_hypervolume_of_two_objectives_is_the_area_under_the_stair():
    """Two overlapping rectangles: 0.5·0.6 + 0.6·0.5 − 0.5·0.5."""
    assert hypervolume(np.array([[0.5, 0.6], [0.6, 0.5], [0.4, 0.4]])) == pytest.approx(0.35)


@pytest.mark.parametrize("num_objectives", [1, 3])
def test_the_hypervolume_is_the_dominated_share_of_the_unit_cube(num_objectives):
    """P(u ≤ some point) for u uniform on the cube, by a lattice."""
    points = np.random.default_rng(0).uniform(0.3, 0.9, (6, num_objectives))
    axis = (np.arange(60) + 0.5) / 60
    lattice = np.stack(np.meshgrid(*[axis] * num_objectives), axis=-1).reshape(-1, 1, num_objectives)
    share = (lattice <= points).all(axis=2).any(axis=1).mean()
    assert hypervolume(points) == pytest.approx(share, abs=0.03)


def test_families_are_compared_at_the_same_weights():
    """With a grid both have its points; without one the policies and the two soups against the two mixtures."""
    grid = grid_candidates(3, Evaluation(grid=2))
    families = families_of(OBJECTIVES, records(), grid)
    weights = {kind: [grid[name].weights for name in names] for kind, names in families.items()}
    assert weights["mixture"] == weights["soup"]
    assert len(weights["soup"]) == 6
    assert families_of(OBJECTIVES, records(), {}) == {
        "mixture": [*OBJECTIVES, "uniform", "mpo"],
        "soup": [*OBJECTIVES, "soup-uniform", "soup-mpo"],
    }


def test_mopo_s_policies_are_a_family_of_their_own():
    """Its volume is that of its policies alone, and they are among the points and in the front."""
    sweep = {f"mopo-{i}": Tendency(0.5 + 0.1 * i, 5.0 - 0.4 * i, 0.3, 1.0) for i in range(3)}
    named = records() | {name: Candidate("model", path=name) for name in sweep}
    families = families_of(OBJECTIVES, named, {})
    assert families["mopo"] == list(sweep)
    assert families_of(OBJECTIVES, named, grid_candidates(3, Evaluation(grid=2)))["mopo"] == list(sweep)
    table = completions(num_prompts=10, world={**ALL_KINDS, **sweep})
    found = compare_points(table, OBJECTIVES, named, families, draws=10, confidence=0.9, seed=0)
    own = np.array([[found.points[name].win_rates[o].value for o in OBJECTIVES] for name in sweep])
    assert found.hypervolume.mopo.value == pytest.approx(hypervolume(own))
    assert found.hypervolume.num_mopo == 3
    assert Pareto.from_json(json.loads(json.dumps(asdict(found)))) == found


def test_without_soups_there_is_one_family_and_no_difference():
    named = {name: record for name, record in records().items() if record.kind != "soup"}
    world = {name: tendency for name, tendency in ALL_KINDS.items() if name in named}
    families = families_of(OBJECTIVES, named, {})
    found = compare_points(
        completions(num_prompts=10, world=world), OBJECTIVES, named, families, draws=10, confidence=0.9, seed=0
    )
    assert families == {"mixture": [*OBJECTIVES, "uniform", "mpo"]}
    assert found.hypervolume.soup is found.hypervolume.difference is None


def test_volumes_and_front_are_those_of_the_points():
    pareto = with_front().pareto
    values = {name: np.array([e.value for e in p.win_rates.values()]) for name, p in pareto.points.items()}
    for kind, volume in (("mixture", pareto.hypervolume.mixture), ("soup", pareto.hypervolume.soup)):
        own = [v for name, v in values.items() if name.startswith("grid-") and pareto.points[name].kind == kind]
        assert len(own) == pareto.hypervolume.num_points == 15
        assert volume.value == pytest.approx(hypervolume(np.array(own)))
        assert volume.low < volume.high
    volume = pareto.hypervolume
    assert volume.difference.value == pytest.approx(volume.mixture.value - volume.soup.value)
    assert volume.reference_point == dict.fromkeys(OBJECTIVES, 0.0)
    assert pareto.num_prompts == 24
    others = [v for name, v in values.items() if not (name.startswith("grid-") and is_corner(pareto.points[name]))]
    for name in pareto.front:
        assert not any(dominates(other, values[name]) for other in others)


def test_a_point_of_the_grid_that_is_a_named_candidate_is_in_the_front_by_its_name_only():
    """The corners of the grid are the policies."""
    pareto = with_front().pareto
    corners = {name for name, p in pareto.points.items() if name.startswith("grid-") and is_corner(p)}
    assert len(corners) == 6
    assert not corners & set(pareto.front)


def test_the_same_completions_under_both_kinds_have_the_same_volume_in_every_draw():
    """Pairedness: a soup family that is a copy of the mixtures differs by 0 in every draw: there is no interval."""
    world = {name: ALL_KINDS[name] for name in ("reference", *OBJECTIVES, "uniform", "mpo")}
    table = completions(num_prompts=20, world=world)
    named = {name: records()[name] for name in world} | {"soup-uniform": Candidate("soup", (0.3, 0.3, 0.4))}
    families = {"mixture": ["uniform", "mpo"], "soup": ["mpo", "uniform"]}
    found = compare_points(table, OBJECTIVES, named, families, draws=30, confidence=0.9, seed=0)
    difference = found.hypervolume.difference
    assert (difference.value, difference.low, difference.high) == (0.0, None, None)
