"""Who is compared: names, weights, and which records are one distribution."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mpo_ray.config import Evaluation
from mpo_ray.evaluation.candidates import Candidate, grid_candidates, named_candidates

FIT = {
    "weights": {"a": 0.75, "b": 0.25},
    "alternatives": {"paper": {"weights": {"a": 1.0, "b": 0.0}}, "balanced": {"weights": {"b": 0.5, "a": 0.5}}},
}


def named(particles: int = 1, **settings: object) -> dict[str, Candidate]:
    return named_candidates(["a", "b"], FIT, Evaluation(**settings), {"theirs": "models/theirs"}, particles=particles)


def test_every_candidate_has_its_weights_in_the_order_of_the_objectives():
    found = named(fits=True, mixtures={"mostly-b": {"b": 0.9, "a": 0.1}})
    assert found == {
        "reference": Candidate("reference"),
        "a": Candidate("mixture", (1.0, 0.0)),
        "b": Candidate("mixture", (0.0, 1.0)),
        "uniform": Candidate("mixture", (0.5, 0.5)),
        "soup-uniform": Candidate("soup", (0.5, 0.5)),
        "soup-mpo": Candidate("soup", (0.75, 0.25)),
        "fit-paper": Candidate("mixture", (1.0, 0.0)),
        "fit-balanced": Candidate("mixture", (0.5, 0.5)),
        "mostly-b": Candidate("mixture", (0.1, 0.9)),
        "theirs": Candidate("model", path="models/theirs"),
        "mpo": Candidate("mixture", (0.75, 0.25)),
    }
    assert [*found][0::10] == ["reference", "mpo"]


def test_soups_and_other_fits_are_left_out_unless_asked_for():
    found = named(soups=False)
    assert not [name for name in found if name.startswith(("soup", "fit"))]


def test_with_particles_every_mixture_has_them_and_mpo_is_there_token_by_token_as_well():
    mixtures = {"mostly-b": {"b": 0.9, "a": 0.1}}
    plain = named(fits=True, mixtures=mixtures)
    found = named(particles=8, fits=True, mixtures=mixtures)
    assert {name for name, candidate in found.items() if candidate.particles == 8} == {
        *("uniform", "fit-paper", "fit-balanced", "mostly-b", "mpo")
    }
    assert found.pop("mpo-token-level") == plain["mpo"]
    assert {name: replace(candidate, particles=1) for name, candidate in found.items()} == plain
    grid = grid_candidates(2, Evaluation(grid=2), particles=8)
    assert {name: candidate.particles for name, candidate in grid.items()} == {
        **{f"grid-{i}": 8 for i in range(3)},
        **{f"grid-soup-{i}": 1 for i in range(3)},
    }


def test_one_objective_has_no_soups_and_no_grid():
    evaluation = Evaluation(grid=4)
    found = named_candidates(["a"], {"weights": {"a": 1.0}}, evaluation, {})
    assert list(found) == ["reference", "a", "uniform", "mpo"]
    assert len({candidate.distribution for candidate in found.values()}) == 2
    assert grid_candidates(1, evaluation) == {}


def test_records_of_one_distribution_are_equal():
    """A soup or mixture at a vertex is the policy; weights that differ in the tenth digit are the same."""
    policy = Candidate("mixture", (1.0, 0.0))
    assert Candidate("soup", (1.0, 0.0)).distribution == policy.distribution == policy
    assert (
        Candidate("mixture", (1 / 3, 2 / 3)).distribution == Candidate("mixture", (1 / 3 + 1e-12, 2 / 3)).distribution
    )
    assert Candidate("soup", (0.5, 0.5)).distribution != Candidate("mixture", (0.5, 0.5)).distribution
    assert Candidate("reference").distribution == Candidate("reference")
    assert Candidate("mixture", (1.0, 0.0), particles=8).distribution == policy
    whole = Candidate("mixture", (0.5, 0.5), particles=8)
    assert whole.distribution == whole != Candidate("mixture", (0.5, 0.5)).distribution


def test_only_a_mixture_of_two_policies_or_more_drops_something():
    assert Candidate("mixture", (0.5, 0.5)).is_proper_mixture
    assert not Candidate("mixture", (0.0, 1.0)).is_proper_mixture
    assert not Candidate("soup", (0.5, 0.5)).is_proper_mixture
    assert not Candidate("reference").is_proper_mixture


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate("soup", (1 / 3, 2 / 3)),
        Candidate("model", path="x"),
        Candidate("reference"),
        Candidate("mixture", (0.5, 0.5), particles=8),
    ],
)
def test_a_record_survives_json(candidate):
    assert Candidate.from_json(candidate.as_json()) == candidate


def test_the_grid_has_mixtures_and_soups_at_the_same_weights():
    found = grid_candidates(3, Evaluation(grid=2))
    assert len(found) == 12
    for i in range(6):
        assert found[f"grid-{i}"].weights == found[f"grid-soup-{i}"].weights
    assert {c.kind for c in grid_candidates(3, Evaluation(grid=2, soups=False)).values()} == {"mixture"}
    assert grid_candidates(3, Evaluation()) == {}
