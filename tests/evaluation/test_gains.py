"""Gains over the reference's samples, in each unit, against sums written out by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from mpo_ray.data.sources import DataError
from mpo_ray.evaluation.gains import Gains

OBJECTIVES = ["good", "short"]


def table(rows: list[tuple[str, str, float, float]]) -> pa.Table:
    """Rows (prompt, proposal, value of good, value of short), as rewards and as log-ratios alike."""
    prompts, proposals, good, short = zip(*rows, strict=True) if rows else ((), (), (), ())
    columns = {
        f"{prefix}_{name}": pa.array(values, pa.float64())
        for prefix in ("reward", "log_ratio")
        for name, values in (("good", good), ("short", short))
    }
    return pa.table(
        {"prompt_id": pa.array(prompts, pa.string()), "proposal": pa.array(proposals, pa.string()), **columns}
    )


SCORES = table(
    [
        ("a", "reference", 1.0, 10.0),
        ("b", "reference", 5.0, 30.0),
        ("a", "reference", 3.0, 20.0),
        ("b", "short", 5.0, 90.0),
        ("a", "short", 0.0, 80.0),
        ("b", "reference", 7.0, 0.0),
    ]
)
COMPLETIONS = table([("b", "", 5.0, 40.0), ("a", "", 3.0, 15.0), ("a", "", 4.0, 0.0)])


def test_a_win_rate_is_the_share_of_pairs_with_the_references_samples_of_the_prompt() -> None:
    """good: a: 3 beats 1, ties 3; 4 beats both: 3.5/4; b: 5 ties 5, loses to 7: 0.5/2. Minus ½, mean over prompts."""
    gains = Gains(SCORES, OBJECTIVES, "win_rate")
    values, errors = gains.of(COMPLETIONS)
    expected = np.array([[3.5 / 4, 1 / 4], [0.5 / 2, 2 / 2]]) - 0.5
    np.testing.assert_allclose(values, expected.mean(axis=0))
    np.testing.assert_allclose(errors, np.abs(expected[0] - expected[1]) / 2)
    assert gains.unit == 1.0


def test_a_reward_gain_is_the_paired_difference_in_the_references_standard_deviations() -> None:
    deviations = np.array([np.std([1.0, 3, 5, 7]), np.std([10.0, 20, 30, 0])])
    values, _ = Gains(SCORES, OBJECTIVES, "reward").of(COMPLETIONS)
    expected = np.array([[3.5 - 2, 7.5 - 15], [5 - 6, 40 - 15]]) / deviations
    np.testing.assert_allclose(values, expected.mean(axis=0))


def test_one_unit_of_a_reward_is_what_one_of_win_rate_is_for_normal_rewards() -> None:
    """A shift by δ deviations wins Φ(δ/√2): gain/unit of the reward is the win rate − ½, to first order in δ."""
    rng, shift = np.random.default_rng(0), 0.1
    reference = rng.normal(size=(8_000, 2))
    values = rng.normal(size=(8_000, 2)) + shift
    prompts = [f"{i // 4:05d}" for i in range(8_000)]
    rows = [(p, "reference", *r) for p, r in zip(prompts, reference.tolist(), strict=True)]
    drawn = table([(p, "", *r) for p, r in zip(prompts, values.tolist(), strict=True)])
    found = {}
    for kind in ("win_rate", "reward"):
        gains = Gains(table(rows), OBJECTIVES, kind)
        found[kind] = gains.of(drawn)[0] / gains.unit
    np.testing.assert_allclose(found["reward"], found["win_rate"], atol=0.02)
    assert found["reward"].mean() == pytest.approx(shift / (2 * np.sqrt(np.pi)), abs=0.015)


def test_an_implicit_gain_is_the_mean_log_ratio_and_needs_no_reference() -> None:
    own = SCORES.filter(pa.compute.not_equal(SCORES["proposal"], "reference"))
    values, _ = Gains(own, OBJECTIVES, "implicit").of(COMPLETIONS)
    np.testing.assert_allclose(values, [(3.5 + 5) / 2, (7.5 + 40) / 2])


def test_the_gains_of_a_policy_are_those_of_the_samples_that_it_drew() -> None:
    gains = Gains(SCORES, OBJECTIVES, "win_rate")
    found = gains.of_policies()
    assert list(found) == ["short"]
    np.testing.assert_allclose(found["short"][0], [(0 + 0.25) / 2 - 0.5, 0.5])


def test_a_table_that_cannot_serve_is_refused_with_the_way_out() -> None:
    drawn_by_policies = SCORES.filter(pa.compute.equal(SCORES["proposal"], "short"))
    with pytest.raises(DataError, match=r"no samples of the reference.*samples\.proposals to all"):
        Gains(drawn_by_policies, OBJECTIVES, "win_rate")
    with pytest.raises(DataError, match="no column 'reward_good', which "):
        Gains(SCORES.drop_columns(["reward_good"]), OBJECTIVES, "win_rate")
    with pytest.raises(DataError, match="no samples of the reference for prompt c"):
        Gains(SCORES, OBJECTIVES, "win_rate").of(table([("c", "", 1.0, 1.0)]))
    with pytest.raises(DataError, match="without a second one their error is unknown"):
        Gains(SCORES, OBJECTIVES, "win_rate").of(COMPLETIONS.slice(0, 1))
    with pytest.raises(DataError, match=r"reward_good is the same for all samples"):
        Gains(table([("a", "reference", 1.0, 2.0), ("b", "reference", 1.0, 3.0)]), OBJECTIVES, "reward")
