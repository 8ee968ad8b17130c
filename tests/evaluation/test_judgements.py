"""Verdicts, outcomes and win rates: what counts as what, and what is left out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mpo_ray.evaluation.judgements import (
    IDENTICAL,
    Outcome,
    Reading,
    Tally,
    combine,
    judged_candidates,
    parse_verdict,
    tally,
)

WIN, LOSS, UNREAD = Outcome("win", 1.0), Outcome("loss", 0.0), Outcome("unparsed", None)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Shorter and clear.\nVerdict: A", "A"),
        ("Verdict: B\n\n  ", "B"),
        ("**Verdict: tie**", "tie"),
        ("verdict: **b**.", "B"),
        ("Verdict : Tie.", "tie"),
        ("", None),
        ("A", None),
        ("Verdict: A or B", None),
        ("Verdict: AB", None),
        ("Verdict: A\nbut I am not sure.", None),
        ("I cannot say. Verdict: A", None),
        ("Verdict: C", None),
        ("Verdict:", None),
        ("Verdict: A/B/tie", None),
    ],
)
def test_only_a_last_line_that_is_a_verdict_and_nothing_else_is_one(answer: str, verdict: str | None) -> None:
    assert parse_verdict(answer) == verdict


def test_the_two_orders_are_averaged_and_contradiction_counts_one_half() -> None:
    """s = ½ (s(candidate as A) + s(candidate as B)); the first reading has the candidate as A."""
    expected = {
        ("A", "B"): ("win", 1.0),
        ("A", "tie"): ("win", 0.75),
        ("tie", "B"): ("win", 0.75),
        ("B", "A"): ("loss", 0.0),
        ("B", "tie"): ("loss", 0.25),
        ("tie", "A"): ("loss", 0.25),
        ("tie", "tie"): ("tie", 0.5),
        ("A", "A"): ("first", 0.5),
        ("B", "B"): ("second", 0.5),
    }
    for readings in itertools.product(("A", "B", "tie"), repeat=2):
        outcome = combine(*readings)
        assert (outcome.kind, outcome.score) == expected[readings]


@pytest.mark.parametrize("kind", ["unparsed", "refused", "missing"])
def test_an_order_without_a_verdict_leaves_the_comparison_out_whatever_the_other_says(kind: Reading) -> None:
    for other in ("A", "B", "tie"):
        assert combine(kind, other) == combine(other, kind) == Outcome(kind, None)  # type: ignore[arg-type]


def test_swapping_candidate_and_reference_gives_the_opposite_score() -> None:
    for a, b in itertools.product(("A", "B", "tie"), repeat=2):
        assert combine(a, b).score == 1.0 - combine(b, a).score


def test_the_position_bias_is_the_share_of_read_comparisons_that_the_position_decided() -> None:
    outcomes = [WIN, LOSS, Outcome("tie", 0.5), Outcome("first", 0.5), Outcome("second", 0.5), IDENTICAL, UNREAD]
    counts = tally(outcomes)
    assert counts == Tally(wins=1, losses=1, ties=1, first=1, second=1, identical=1, unparsed=1)
    assert counts.position_bias == 2 / 5
    assert tally([IDENTICAL, UNREAD]).position_bias is None


def test_comparisons_without_a_verdict_are_left_out_of_the_win_rate() -> None:
    """Three wins and one loss that were read are ¾, however many were not; as ties they would pull towards ½."""
    outcomes = {"mpo": {"helpful": [WIN, WIN, WIN, LOSS, *[UNREAD] * 12]}}
    estimate = judged_candidates(outcomes, draws=300, confidence=0.9, seed=0)["mpo"].win_rates["helpful"]
    assert estimate is not None
    assert estimate.value == 0.75
    assert estimate.low is not None
    assert estimate.high is not None
    assert 0.0 <= estimate.low < 0.75 < estimate.high <= 1.0


def test_a_candidate_of_which_nothing_was_read_has_no_win_rate() -> None:
    outcomes = {"mpo": {"helpful": [WIN, WIN]}, "other": {"helpful": [UNREAD, UNREAD]}}
    other = judged_candidates(outcomes, draws=50, confidence=0.9, seed=0)["other"]
    assert (other.win_rates, other.minimum_win_rate, other.mpo_minus_this) == ({"helpful": None}, None, None)


def test_one_prompt_says_little() -> None:
    """A single win is [0.05, 1] at 90 %, as Clopper and Pearson have it."""
    found = judged_candidates({"mpo": {"helpful": [WIN]}}, draws=20_000, confidence=0.9, seed=0)["mpo"]
    estimate = found.minimum_win_rate
    assert estimate is not None
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((1.0, 0.05, 1.0), abs=0.005)


def test_a_judge_that_prefers_a_candidate_every_time_is_not_certain_to() -> None:
    """24 of 24: 1.00 [0.86, 1.00], and no better than another one with 24 of 24."""
    outcomes = {name: {"helpful": [WIN] * 24, "kind": [WIN] * 24} for name in ("other", "mpo")}
    found = judged_candidates(outcomes, draws=4000, confidence=0.95, seed=0)
    for rate in (*found["mpo"].win_rates.values(), found["mpo"].minimum_win_rate):
        assert rate is not None
        assert (rate.value, rate.low, rate.high) == pytest.approx((1.0, 0.858, 1.0), abs=0.01)
    difference = found["other"].mpo_minus_this
    assert difference is not None
    assert difference.holds_zero
    assert difference.low < -0.1 < 0.1 < difference.high


def test_the_minimum_is_over_objectives_and_differences_from_mpo_are_paired() -> None:
    """The other candidate scores 0.25 less on each prompt and objective: narrower than either win rate."""
    rng = np.random.default_rng(0)
    scores = {o: rng.choice([0.25, 0.5, 0.75, 1.0], size=400) for o in ("helpful", "harmless")}
    outcomes = {
        name: {o: [Outcome("win", float(s - less)) for s in values] for o, values in scores.items()}
        for name, less in (("other", 0.25), ("mpo", 0.0))
    }
    result = judged_candidates(outcomes, draws=200, confidence=0.9, seed=0)
    minimum, difference = result["mpo"].minimum_win_rate, result["other"].mpo_minus_this
    assert minimum is not None
    assert difference is not None
    assert minimum.value == pytest.approx(min(values.mean() for values in scores.values()))
    assert difference.value == pytest.approx(0.25)
    assert 0.2 < difference.low < 0.25 < difference.high < 0.3
    assert result["other"].prompts_to_decide is None  # it is decided
    assert result["mpo"].mpo_minus_this is None


def test_intervals_cover_the_true_win_rate_as_often_as_they_say() -> None:
    """90 % intervals from 60 prompts of which a third is unread hold the true 0.6 in about 90 % of 200 repetitions."""
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        wins, read = rng.random(60) < 0.6, rng.random(60) < 2 / 3
        row = [(WIN if win else LOSS) if seen else UNREAD for win, seen in zip(wins, read, strict=True)]
        estimate = judged_candidates({"x": {"o": row}}, draws=300, confidence=0.9, seed=seed)["x"].win_rates["o"]
        assert estimate is not None
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 0.6 <= estimate.high
    assert 0.83 <= covered / 200 <= 0.96
