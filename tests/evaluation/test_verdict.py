"""What is said of MPO: every candidate is named, and nothing is said that an interval does not hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mpo_ray.evaluation.estimates import Estimate, written
from mpo_ray.evaluation.metrics import Metrics
from mpo_ray.evaluation.verdict import SHORT, baselines, verdict
from tests.evaluation.world import ALL_KINDS, WORLD, Tendency, completions, evaluated, with_front


def with_differences(metrics: Metrics, differences: dict[str, Estimate], prompts: int | None = None) -> Metrics:
    """The metrics with these differences in the place of their own, undecided ones with `prompts`."""
    changed = {
        name: replace(metrics.candidates[name], mpo_minus_this=gap, prompts_to_decide=prompts)
        for name, gap in differences.items()
    }
    return replace(metrics, candidates=metrics.candidates | changed)


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    return evaluated()


ABOVE, OPEN, BELOW = Estimate(0.1, 0.05, 0.15), Estimate(0.02, -0.01, 0.05), Estimate(-0.1, -0.15, -0.05)


def all_of(metrics: Metrics, gap: Estimate) -> dict[str, Estimate]:
    return {name: gap for name in metrics.candidates if name != "mpo"}


def test_it_is_highest_only_where_every_interval_leaves_0_out(metrics):
    found = verdict(with_differences(metrics, all_of(metrics, ABOVE)))
    assert found.kind == "highest"
    own = written(metrics.candidates["mpo"].minimum_win_rate)
    assert (
        f"MPO's minimum win rate, {own}, is the highest of all 6 candidates (95 % intervals, 120 prompts)."
        in found.sentence
    )
    assert "Every paired difference excludes 0. The next is " in found.sentence


@pytest.mark.parametrize("name", ["reference", "positive", "concise", "detailed", "uniform"])
def test_one_interval_that_holds_0_makes_it_undecided_and_every_candidate_is_named(metrics, name):
    found = verdict(with_differences(metrics, {**all_of(metrics, ABOVE), name: OPEN}, prompts=480))
    assert found.kind == "undecided"
    assert found.sentence.startswith("Undecided: ")
    assert f"The paired difference holds 0 against {metrics.label(name)} (" in found.sentence
    assert "MPO − this 0.020 [-0.010, 0.050]); about 480 prompts would decide." in found.sentence
    for other in metrics.candidates:
        assert metrics.label(other).removesuffix(" mixture") in found.sentence
    assert "is the highest of all 6" in found.sentence  # after the word "whether"


def test_a_difference_that_touches_0_is_undecided(metrics):
    found = verdict(with_differences(metrics, {**all_of(metrics, ABOVE), "uniform": Estimate(0.1, 0.0, 0.2)}))
    assert found.kind == "undecided"
    assert "no practical number of prompts would decide" in found.sentence


@pytest.mark.parametrize("name", ["reference", "concise", "uniform"])
def test_one_candidate_above_mpo_is_told_whoever_else_is_below(metrics, name):
    """The reference and the uniform mixture count as much as the policies."""
    found = verdict(with_differences(metrics, {**all_of(metrics, ABOVE), "detailed": OPEN, name: BELOW}))
    assert found.kind == "below"
    assert "is not the highest" in found.sentence
    assert f"It is below {metrics.label(name)} (" in found.sentence
    assert f"The paired difference holds 0 against {metrics.label('detailed')} (" in found.sentence


def test_a_run_where_soup_uniform_and_reference_are_above_mpo_by_estimate_does_not_call_it_highest():
    """What was told before: "the highest by estimate", of the policies alone."""
    world = {**ALL_KINDS, "mpo": Tendency(0.40, 5.3, 0.28, 1.0), "soup-uniform": Tendency(0.62, 4.6, 0.38, 0.8)}
    for seed in range(3):
        found = evaluated(completions(num_prompts=24, seed=seed, world=world))
        minima = {name: candidate.minimum_win_rate.value for name, candidate in found.candidates.items()}
        assert minima["mpo"] < min(minima["reference"], minima["uniform"], minima["soup-uniform"])
        told = verdict(found)
        assert told.kind in ("undecided", "below")
        assert "highest by estimate" not in told.sentence
        for name in found.candidates:
            assert found.label(name).removesuffix(" mixture") in told.sentence


def test_a_sentence_agrees_with_the_intervals_of_its_table():
    """Of many small evaluations: the kind follows from the differences alone."""
    kinds = set()
    for seed in range(4):
        for num_prompts in (12, 60):
            for mpo in (Tendency(0.51, 4.9, 0.31, 1.0), Tendency(0.9, 3.0, 0.8, 1.0), Tendency(0.1, 7.0, 0.1, 1.0)):
                found = evaluated(completions(num_prompts=num_prompts, seed=seed, world={**WORLD, "mpo": mpo}))
                gaps = [c.mpo_minus_this for name, c in found.candidates.items() if name != "mpo"]
                kind = "highest" if min(g.low for g in gaps) > 0 else "undecided"
                kind = "below" if min(g.high for g in gaps) < 0 else kind
                assert verdict(found).kind == kind
                kinds.add(kind)
    assert kinds == set(SHORT)


def test_the_same_completions_are_neither_above_nor_undecided(metrics):
    found = verdict(with_differences(metrics, {**all_of(metrics, ABOVE), "positive": Estimate(0.0)}))
    assert found.kind == "highest"
    assert "The completions of positive policy are MPO's own." in found.sentence


def test_the_grid_counts_too():
    """A point that MPO is not above outside its interval makes the whole undecided, and is named with its weights."""
    metrics = with_front()
    highest = with_differences(metrics, all_of(metrics, ABOVE))
    grid = metrics.pareto.against_grid
    assert grid.above + grid.undecided + grid.below == 2 * 15 - 6
    best = metrics.pareto.points[grid.best]
    assert grid.minimum.value == pytest.approx(min(rate.value for rate in best.win_rates.values()))
    for counts, kind in (((24, 0, 0), "highest"), ((20, 4, 0), "undecided"), ((20, 3, 1), "undecided")):
        above, undecided, below = counts
        changed = replace(grid, above=above, undecided=undecided, below=below, mpo_minus_best=OPEN)
        found = verdict(replace(highest, pareto=replace(metrics.pareto, against_grid=changed)))
        assert found.kind == kind
        told = f"Of the 24 other points of the grid (24 prompts), it is above {above}, below {below}, and undecided"
        assert told in found.sentence
        assert (f"is the {best.kind} " in found.sentence) == (kind != "highest")
        assert ("the best of many estimates is flattered" in found.sentence) == (kind != "highest")


def test_means_over_runs_leave_out_the_reference_and_other_fits_of_mpos_weights():
    assert baselines(with_front()) == [
        *("positive", "concise", "detailed", "uniform", "soup-uniform", "soup-mpo", "mostly-concise", "morlhf")
    ]
