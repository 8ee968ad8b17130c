"""What fit.json says: the theorems of design 2.2 as a user reads them off a table."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from mpo_ray.config import Fit
from mpo_ray.data.scores import scores_from_table
from mpo_ray.fitting.table_fit import fit_table
from mpo_ray.maths.exact_fit import solve
from tests.fitting.tables import NAMES, score_rows, scores, worlds

QUICK = Fit(bootstrap_draws=0)


def test_an_exact_fit_balances_the_objectives_that_bind_and_proves_it() -> None:
    """gap ≤ 1e-8; E_{π_λ}[ℓ_k] is equal and least for those that bind; gains are over the reference."""
    fit = fit_table(scores(worlds(30), each=6), QUICK, seed=0, method="exact", estimator="balanced")
    assert fit["gap"] <= 1e-8
    under = fit["balance"]["mpo"]
    assert under == pytest.approx(fit["gradient"])
    least = min(under.values())
    assert {name for name in NAMES if fit["weights"][name] > 1e-6} <= set(fit["binding"])
    for name in NAMES:
        assert (under[name] == pytest.approx(least, abs=1e-6)) == (name in fit["binding"])
        assert fit["gains"][name] == pytest.approx(under[name] - fit["balance"]["reference"][name])
    for vertex in NAMES:
        assert min(fit["balance"][vertex].values()) <= least + 1e-9, "no single policy has a better worst objective"


def test_an_objective_that_is_ahead_under_the_others_does_not_bind() -> None:
    """ℓ_3 larger by 5 nats everywhere: λ_3 = 0, E_{π_λ}[ℓ_3] above the others', which bind."""
    rows = score_rows(worlds(30), each=6, proposals=("reference",))
    column = rows.column_names.index(f"log_ratio_{NAMES[2]}")
    ahead = rows.set_column(column, rows.column_names[column], pc.add(rows.column(column), 5.0))
    fit = fit_table(scores_from_table(ahead, NAMES), QUICK, seed=0, method="exact", estimator="paper")
    assert fit["weights"][NAMES[2]] == pytest.approx(0.0, abs=1e-9)
    assert fit["binding"] == list(NAMES[:2])


def test_balance_under_the_reference_and_the_vertices_is_that_of_the_enumerated_distributions() -> None:
    """E_{π_ref}[ℓ_k] and E_{π_j}[ℓ_k] from samples of all of them tend to the sums over every response."""
    of = worlds(12)
    fit = fit_table(scores(of, each=400), QUICK, seed=0, method="exact", estimator="balanced")
    distributions = {"reference": [np.exp(w.log_reference) for w in of]}
    distributions |= {name: [np.exp(w.log_policies[:, k]) for w in of] for k, name in enumerate(NAMES)}
    for who, probabilities in distributions.items():
        exact = np.mean([p @ w.log_ratios for p, w in zip(probabilities, of, strict=True)], axis=0)
        np.testing.assert_allclose(list(fit["balance"][who].values()), exact, atol=0.06)


def test_both_estimators_agree_where_samples_are_many_and_say_who_drew() -> None:
    """F and λ of the paper's and the balanced estimator on the same worlds; `proposals` counts rows."""
    table = scores(worlds(40), each=200)
    found = {e: fit_table(table, QUICK, seed=0, method="exact", estimator=e) for e in ("paper", "balanced")}
    assert found["paper"]["objective_value"] == pytest.approx(found["balanced"]["objective_value"], abs=0.02)
    np.testing.assert_allclose(*[list(f["weights"].values()) for f in found.values()], atol=0.08)
    assert found["paper"]["proposals"] == {"reference": 8000}
    assert found["balanced"]["proposals"] == dict.fromkeys(("reference", *NAMES), 8000)
    assert found["balanced"]["num_samples"] == 4 * found["paper"]["num_samples"]


def test_leaving_an_objective_out_is_the_fit_of_the_others_on_the_same_samples() -> None:
    """λ_left out = 0, F is the minimum over the face, never below the whole one, and the one left out loses."""
    table = scores(worlds(30), each=6)
    fit = fit_table(table, QUICK, seed=0, method="exact", estimator="balanced")
    for name, found in fit["leave_one_out"].items():
        others = [n for n in NAMES if n != name]
        alone = solve(table.samples("balanced", others))
        assert found["weights"][name] == 0.0
        assert [found["weights"][n] for n in others] == pytest.approx(alone.weights[0].tolist(), abs=1e-6)
        assert found["objective_value"] == pytest.approx(float(alone.objective[0]))
        assert found["objective_value"] >= fit["objective_value"] - 1e-9
        if name in fit["binding"]:
            assert found["gains"][name] < fit["gains"][name]


def test_a_new_objective_is_one_more_column_on_the_same_samples() -> None:
    """Two objectives, then a third scored on the samples that are there: the first two columns are not touched."""
    rows = score_rows(worlds(20), each=5, proposals=("reference", "warm", "brief"))
    two = scores_from_table(rows, ["warm", "brief"])
    three = scores_from_table(rows, list(NAMES))
    np.testing.assert_array_equal(two.log_ratios, three.log_ratios[:, :2])
    before, after = (fit_table(t, QUICK, seed=0, method="exact", estimator="balanced") for t in (two, three))
    assert before["weights"] == pytest.approx(
        {n: v for n, v in after["leave_one_out"]["exact"]["weights"].items() if n != "exact"}, abs=1e-6
    )
    assert after["objective_value"] <= before["objective_value"] + 1e-9


def test_given_weights_are_not_fitted_and_come_with_their_gains() -> None:
    """MORLHF (Lemma 3.9): λ is the user's; F, gap, gains and balance are those of the table at it."""
    given = {"warm": 0.2, "brief": 0.8}
    table = scores(worlds(20), each=6)
    fit = fit_table(table, Fit(method="fixed", weights=given), seed=0, method="fixed", estimator="balanced")
    assert fit["weights"] == {"warm": 0.2, "brief": 0.8, "exact": 0.0}
    assert fit["gap"] > 1e-3
    assert (fit["trace"], fit["intervals"]) == (None, None)
    best = fit_table(table, QUICK, seed=0, method="exact", estimator="balanced")
    assert fit["objective_value"] > best["objective_value"]
    with pytest.raises(ValueError, match="unknown objective 'wrong'"):
        fit_table(table, Fit(method="fixed", weights={"wrong": 1.0}), seed=0, method="fixed", estimator="balanced")


@pytest.mark.parametrize("prompts_per_step", [1, 8, "all"])
def test_a_descent_keeps_its_trace_and_ends_near_the_exact_fit(prompts_per_step: int | str) -> None:
    """The trace ends with the answer; its gap falls; F is within the gap of the optimum."""
    table = scores(worlds(30), each=6)
    settings = Fit.model_validate(
        {"bootstrap_draws": 0, "bsmd": {"steps": 500, "step_scale": 2.0, "prompts_per_step": prompts_per_step}}
    )
    fit = fit_table(table, settings, seed=0, method="bsmd", estimator="paper")
    trace = fit["trace"]
    assert trace["steps"][-1] == 500
    assert trace["weights"][-1] == pytest.approx(list(fit["weights"].values()))
    assert trace["gap"][-1] == pytest.approx(fit["gap"])
    assert trace["gap"][-1] < trace["gap"][0]
    assert trace["objective_value"][-1] == pytest.approx(fit["objective_value"])
    least = solve(table.samples("paper")).objective[0]
    assert least <= fit["objective_value"] <= least + fit["gap"]


def test_the_intervals_hold_the_fit_and_shrink_with_prompts() -> None:
    """Bootstrap over prompts: λ_k and F of the exact fit inside; four times the prompts, about half the width."""
    widths = []
    for number in (40, 160):
        fit = fit_table(
            scores(worlds(number), each=5), Fit(bootstrap_draws=100), seed=0, method="exact", estimator="balanced"
        )
        bounds = fit["intervals"]
        for name in NAMES:
            low, high = bounds["weights"][name]
            assert low - 1e-9 <= fit["weights"][name] <= high + 1e-9
        low, high = bounds["objective_value"]
        assert low <= fit["objective_value"] <= high
        widths.append(high - low)
    assert 0.3 < widths[1] / widths[0] < 0.8


def test_one_objective_has_weight_one_and_no_leave_one_out() -> None:
    """K = 1: nothing to weigh, and nothing breaks."""
    rows = score_rows(worlds(5, num_policies=1), each=4, proposals=("reference", "warm"))
    fit = fit_table(
        scores_from_table(rows, ["warm"], min_objectives=1), QUICK, seed=0, method="exact", estimator="paper"
    )
    assert fit["weights"] == {"warm": 1.0}
    assert fit["leave_one_out"] == {}


def test_prompts_count_alike_whatever_their_number_of_responses() -> None:
    """F is the mean over prompts of log Ẑ, each a mean over its own rows: repeating a prompt's rows changes nothing."""
    rows = score_rows(worlds(3), each=3, proposals=("reference",))
    first = rows.slice(0, 3)
    again = first.set_column(1, "sample_id", [[10, 11, 12]])
    once, doubled = scores_from_table(rows), scores_from_table(pa.concat_tables([rows, again.cast(rows.schema)]))
    one, two = (fit_table(t, QUICK, seed=0, method="exact", estimator="paper") for t in (once, doubled))
    assert two["objective_value"] == pytest.approx(one["objective_value"], abs=1e-9)
    assert two["samples_per_prompt"] == {"min": 3, "max": 6}
