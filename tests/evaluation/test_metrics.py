"""The numbers of an evaluation, against sums over the table written out here, and its refusals."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from mpo_ray.evaluation.estimates import Estimate, number, written
from mpo_ray.evaluation.metrics import Metrics, evaluate_completions
from mpo_ray.evaluation.verdict import verdict
from mpo_ray.maths.statistics import SignTest, sign_test
from tests.evaluation.world import ALL_KINDS, OBJECTIVES, WORLD, completions, evaluated, with_front


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return completions()


@pytest.fixture(scope="module")
def metrics(table) -> Metrics:
    return evaluated(table)


def rewards(table: pa.Table, candidate: str, objective: str) -> np.ndarray:
    """(P, N) in the order of the table."""
    rows = table.filter(pc.equal(table["candidate"], candidate))
    return rows[f"reward_{objective}"].to_numpy().reshape(120, 2)


def test_every_number_is_the_mean_over_prompts_of_the_table(table, metrics):
    """Rewards, win rates pair by pair, KL, length and finished share, for every candidate and objective."""
    for name, candidate in metrics.candidates.items():
        rows = table.filter(pc.equal(table["candidate"], name))
        for objective in OBJECTIVES:
            ours, theirs = rewards(table, name, objective), rewards(table, "reference", objective)
            assert candidate.rewards[objective].value == pytest.approx(ours.mean())
            pairs = [np.sign(a[:, None] - b[None]).mean() / 2 + 0.5 for a, b in zip(ours, theirs, strict=True)]
            assert candidate.win_rates[objective].value == pytest.approx(np.mean(pairs))
        assert candidate.minimum_win_rate.value == min(w.value for w in candidate.win_rates.values())
        assert candidate.kl.value == pytest.approx(pc.mean(rows["kl"]).as_py())
        assert candidate.log_z.value == pytest.approx(pc.mean(rows["log_z"]).as_py())
        assert candidate.num_tokens == pytest.approx(pc.mean(rows["num_tokens"]).as_py())
        assert candidate.finished_share == pytest.approx(pc.mean(rows["finished"]).as_py())
    assert (metrics.num_prompts, metrics.num_completions) == (120, 120 * 2 * 6)


def test_candidates_come_reference_first_and_mpo_last(metrics):
    assert list(metrics.candidates) == ["reference", *OBJECTIVES, "uniform", "mpo"]
    assert [metrics.label(name) for name in ("reference", "concise", "uniform", "mpo")] == [
        "reference",
        "concise policy",
        "uniform mixture",
        "MPO mixture",
    ]


def test_intervals_hold_their_estimate_and_the_reference_has_none_against_itself(metrics):
    """The reference wins ½ against itself and has KL 0 by definition; its mean reward is an estimate."""
    reference = metrics.candidates["reference"]
    assert all(win == Estimate(0.5) for win in (*reference.win_rates.values(), reference.minimum_win_rate))
    assert reference.kl == reference.log_z == metrics.candidates["positive"].log_z == Estimate(0.0)
    assert reference.rewards["positive"].low is not None
    for name in ("positive", "uniform", "mpo"):
        candidate = metrics.candidates[name]
        for e in (*candidate.rewards.values(), *candidate.win_rates.values(), candidate.minimum_win_rate, candidate.kl):
            assert e.low is not None
            assert e.high is not None
            assert e.low < e.value < e.high


def test_the_interval_of_a_win_rate_is_that_of_a_mean_over_prompts(table, metrics):
    """Width ≈ 2 · 1.96 · sd(W(x)) / √P, as the central limit theorem has it for P prompts, not for completions."""
    ours, theirs = rewards(table, "mpo", "positive"), rewards(table, "reference", "positive")
    per_prompt = (np.sign(ours[:, :, None] - theirs[:, None, :]) / 2 + 0.5).mean(axis=(1, 2))
    expected = 2 * 1.96 * per_prompt.std() / np.sqrt(120)
    found = metrics.candidates["mpo"].win_rates["positive"]
    assert found.high - found.low == pytest.approx(expected, rel=0.2)


def test_a_normalised_reward_is_in_the_references_standard_deviations(table, metrics):
    """z = (mean − mean_ref) / std_ref over the reference's completions; the reference has 0 by definition."""
    for name, candidate in metrics.candidates.items():
        for objective in OBJECTIVES:
            theirs = rewards(table, "reference", objective)
            expected = (rewards(table, name, objective).mean() - theirs.mean()) / theirs.std()
            z = candidate.normalized_rewards[objective]
            assert z.value == pytest.approx(expected, abs=1e-12)
            assert z == Estimate(0.0) if name == "reference" else z.low < z.value < z.high


def test_the_interval_of_a_normalised_reward_knows_that_its_scale_is_an_estimate():
    """A candidate that is the reference plus a constant c has z = c/s, whose interval is that of the scale s alone."""
    table = completions(num_prompts=40, world=dict.fromkeys(("reference", "mpo"), WORLD["reference"]))
    reference = table.filter(pc.equal(table["candidate"], "reference"))
    index = reference.column_names.index("reward_positive")
    shifted = reference.set_column(index, "reward_positive", pc.add(reference["reward_positive"], 10.0))
    mpo = shifted.set_column(0, "candidate", pa.array(["mpo"] * shifted.num_rows))
    metrics = evaluate_completions(pa.concat_tables([reference, mpo]), ["positive"], draws=400, confidence=0.95, seed=0)
    z = metrics.candidates["mpo"].normalized_rewards["positive"]
    scale = reference["reward_positive"].to_numpy().std()
    assert z.value == pytest.approx(10 / scale)
    assert 0.1 < (z.high - z.low) / z.value < 0.6


def test_rewards_that_are_all_equal_for_the_reference_have_no_normalised_form(table):
    index = table.column_names.index("reward_concise")
    values = np.where(table["candidate"].to_numpy() == "reference", 3.0, table["reward_concise"].to_numpy())
    metrics = evaluated(table.set_column(index, "reward_concise", pa.array(values)))
    assert set(metrics.candidates["mpo"].normalized_rewards) == {"positive", "detailed"}
    json.dumps(metrics.as_json(), allow_nan=False)


def test_the_sign_test_counts_prompts_with_the_higher_mean_reward(table, metrics):
    """Per objective, MPO against each candidate; p is the exact binomial's."""
    for name in ("reference", "concise", "uniform"):
        for objective in OBJECTIVES:
            gap = rewards(table, "mpo", objective).mean(axis=1) - rewards(table, name, objective).mean(axis=1)
            test = metrics.candidates[name].sign_tests[objective]
            assert (test.above, test.below, test.ties) == ((gap > 0).sum(), (gap < 0).sum(), (gap == 0).sum())
            assert test == sign_test(gap)
    assert metrics.candidates["concise"].sign_tests["concise"].p_value < 0.01
    assert metrics.candidates["mpo"].sign_tests is None


def test_the_order_of_the_rows_does_not_matter(table, metrics):
    shuffled = table.take(np.random.default_rng(0).permutation(table.num_rows))
    again = evaluated(shuffled)
    assert again.candidates["mpo"] == metrics.candidates["mpo"]
    assert again.candidates["reference"] == metrics.candidates["reference"]


def test_the_difference_is_that_of_the_minima(metrics):
    mpo = metrics.candidates["mpo"].minimum_win_rate.value
    for name in ("reference", *OBJECTIVES, "uniform"):
        candidate = metrics.candidates[name]
        assert candidate.mpo_minus_this.value == pytest.approx(mpo - candidate.minimum_win_rate.value)


def test_a_candidate_that_wins_every_time_is_not_certain_to(table):
    """24 of 24 won on every objective: 1.00 with the interval of Clopper and Pearson, and MPO's the same."""
    table = completions(num_prompts=24, per_prompt=1)
    columns = {f"reward_{o}": table["candidate"].to_numpy() == "mpo" for o in OBJECTIVES}
    for name, wins in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(wins.astype(float)))
    metrics = evaluate_completions(table, OBJECTIVES, draws=4000, confidence=0.95, seed=0)
    mpo = metrics.candidates["mpo"]
    for win in (*mpo.win_rates.values(), mpo.minimum_win_rate):
        assert (win.value, win.high) == (1.0, 1.0)
        assert win.low == pytest.approx(0.858, abs=0.01)
    assert mpo.rewards["positive"] == Estimate(1.0)  # a reward has no bounds: nothing is known of its spread
    assert metrics.candidates["uniform"].mpo_minus_this.low > 0.2
    json.dumps(metrics.as_json(), allow_nan=False)


def test_two_candidates_with_equal_rewards_are_not_known_to_be_equal(table):
    """All differences are 0, of different completions: the interval is not [0, 0]. The same completions are."""
    index = table.column_names.index("reward_positive")
    flat = table.set_column(index, "reward_positive", pa.array(np.ones(table.num_rows)))
    found = evaluate_completions(flat, ["positive"], draws=400, confidence=0.95, seed=0).candidates["uniform"]
    assert found.mpo_minus_this.value == 0.0
    assert found.mpo_minus_this.low < -0.01 < 0.01 < found.mpo_minus_this.high
    assert found.prompts_to_decide is None
    copies = table.filter(pc.equal(table["candidate"], "mpo"))
    copies = copies.set_column(0, "candidate", pa.array(["copy"] * copies.num_rows))
    metrics = evaluated(pa.concat_tables([table, copies]))
    assert metrics.candidates["copy"].mpo_minus_this == Estimate(0.0)
    assert metrics.candidates["copy"].sign_tests["concise"] == SignTest(0, 0, 120, 1.0)
    assert metrics.candidates["mpo"].mpo_minus_this is None


def test_the_prompts_that_would_decide_stand_where_the_difference_is_undecided(metrics):
    for name in ("reference", *OBJECTIVES, "uniform"):
        candidate = metrics.candidates[name]
        if candidate.mpo_minus_this.holds_zero:
            assert candidate.prompts_to_decide is None or candidate.prompts_to_decide > 120
        else:
            assert candidate.prompts_to_decide is None


def test_without_mpo_there_is_no_difference_and_no_verdict(table):
    metrics = evaluated(table.filter(pc.not_equal(table["candidate"], "mpo")))
    assert all(c.mpo_minus_this is None and c.sign_tests is None for c in metrics.candidates.values())
    assert verdict(metrics) is None


def test_metrics_survive_json(metrics):
    for found in (metrics, with_front(), with_front(steps=None)):
        assert Metrics.from_json(json.loads(json.dumps(found.as_json(), allow_nan=False))) == found


def test_every_kind_of_candidate_has_a_label():
    metrics = with_front()
    assert [
        metrics.label(name) for name in ("soup-uniform", "mpo-token-level", "fit-paper", "mostly-concise", "morlhf")
    ] == [
        "uniform soup",
        "MPO's λ, token by token",
        "paper fit",
        "mostly-concise",
        "morlhf",
    ]
    assert list(metrics.candidates) == list(ALL_KINDS)[:5] + list(ALL_KINDS)[6:] + ["mpo"]


def test_an_estimate_is_written_with_its_interval_and_no_negative_zero():
    assert written(Estimate(0.5)) == "0.50"
    assert written(Estimate(0.561, -0.001, 0.6)) == "0.56 [0.00, 0.60]"
    assert number(-1.26, 1) == "-1.3"


def change(table: pa.Table, row: int, column: str, value: object) -> pa.Table:
    rows = table.to_pylist()
    rows[row][column] = value
    return pa.Table.from_pylist(rows, schema=table.schema)


def row_of(table: pa.Table, candidate: str) -> int:
    return table["candidate"].to_pylist().index(candidate)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda t: t.filter(pc.or_(pc.not_equal(t["candidate"], "mpo"), pc.not_equal(t["prompt_id"], f"{7:016x}"))),
            "'mpo' has 119 of the reference's 120 prompts: 1 missing .first '0000000000000007'",
        ),
        (
            lambda t: t.filter(
                pc.or_(pc.not_equal(t["candidate"], "reference"), pc.not_equal(t["prompt_id"], f"{7:016x}"))
            ),
            "'positive' has 120 .* 1 that the reference lacks .first '0000000000000007'",
        ),
        (
            lambda t: change(t, row_of(t, "uniform"), "reward_concise", float("nan")),
            "'uniform', prompt '0000000000000000', completion 0: the reward of objective 'concise' is nan",
        ),
        (
            lambda t: change(t, row_of(t, "concise"), "reward_detailed", None),
            "'concise', prompt '0000000000000000'.* objective 'detailed' is nan",
        ),
        (lambda t: change(t, row_of(t, "mpo"), "kl", float("inf")), "'mpo', prompt .* the kl is inf"),
        (
            lambda t: change(t, row_of(t, "mpo"), "completion_id", 1),
            "'mpo' has completion 1 of prompt .* more than once",
        ),
        (
            lambda t: change(t, row_of(t, "mpo"), "prompt_id", f"{1:016x}"),
            "'mpo' has 1 completion.s. of prompt '0000000000000000' and 3 of '0000000000000001'",
        ),
        (lambda t: t.filter(pc.not_equal(t["candidate"], "reference")), "no candidate 'reference'.*it has positive"),
        (lambda t: t.slice(0, 0), "no candidate 'reference'.*no rows"),
        (lambda t: t.drop_columns(["reward_concise"]), "no column 'reward_concise'; it has candidate, "),
    ],
)
def test_a_table_that_cannot_be_compared_is_refused_by_name(table, spoil, message):
    with pytest.raises(ValueError, match=message):
        evaluated(spoil(table))


def test_one_prompt_is_too_few_for_an_interval(table):
    with pytest.raises(ValueError, match="at least 2 prompts"):
        evaluate_completions(completions(num_prompts=1), OBJECTIVES, draws=10, confidence=0.9, seed=0)
