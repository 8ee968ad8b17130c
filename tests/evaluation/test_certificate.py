"""MOPO's certificate: the win rates of the evaluation, their intervals, and one word for every bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import expit

from mpo_ray.evaluation.certificate import certificate_lines, certify
from mpo_ray.maths.win_probability import LINKS
from tests.evaluation.world import WORLD, Tendency, completions, evaluated

MOPO = "mopo-positive"


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return completions(world={**WORLD, MOPO: Tendency(0.7, 4.2, 0.36, 1.0)})


def certified(table: pa.Table, bounds: dict[str, float], link: str = "order", **changes: Any) -> dict[str, Any]:
    settings = {"draws": 400, "confidence": 0.95, "seed": 0, **changes}
    return certify(table, MOPO, "positive", bounds, link=LINKS[link], **settings)


def test_it_says_of_win_rates_what_the_evaluation_says(table) -> None:
    """With the link of a win rate, value and interval are those of the candidate's metrics."""
    found = certified(table, {"concise": 0.5, "detailed": 0.4})
    rates = evaluated(table).candidates[MOPO].win_rates
    for name, entry in {**found["primary"], **found["bounds"]}.items():
        assert entry["value"] == pytest.approx(rates[name].value)
        assert entry["low"] == pytest.approx(rates[name].low, abs=0.01)
        assert entry["high"] == pytest.approx(rates[name].high, abs=0.01)
    assert found["num_prompts"] == 120
    assert found["num_completions"] == 240


def test_the_link_is_that_of_the_pool(table) -> None:
    """σ of the difference of rewards, averaged over the reference's completions of the same prompt."""
    found = certified(table, {"concise": 0.5}, link="bradley_terry")["bounds"]["concise"]["value"]
    rows = {name: table.filter(pa.array(np.array(table["candidate"]) == name)) for name in (MOPO, "reference")}
    ours, theirs = (
        rows[name].sort_by([("prompt_id", "ascending"), ("completion_id", "ascending")])["reward_concise"].to_numpy()
        for name in rows
    )
    wins = expit(ours.reshape(-1, 2, 1) - theirs.reshape(-1, 1, 2))
    assert found == pytest.approx(wins.mean())


@pytest.mark.parametrize(("offset", "verdict"), [(-0.1, "met"), (0.0, "undecided"), (0.1, "not met")])
def test_a_bound_is_met_or_not_where_the_whole_interval_is(table, offset: float, verdict: str) -> None:
    value = certified(table, {"concise": 0.5})["bounds"]["concise"]["value"]
    found = certified(table, {"concise": value + offset})["bounds"]["concise"]
    assert found["verdict"] == verdict
    assert found["bound"] == pytest.approx(value + offset)


def test_the_edges_belong_to_met_and_to_undecided(table) -> None:
    entry = certified(table, {"concise": 0.5})["bounds"]["concise"]
    assert certified(table, {"concise": entry["low"]})["bounds"]["concise"]["verdict"] == "met"
    assert certified(table, {"concise": entry["high"]})["bounds"]["concise"]["verdict"] == "undecided"


def test_the_terminal_has_a_line_for_every_objective(table) -> None:
    found = certified(table, {"concise": 0.1})
    first, second = certificate_lines("positive", found)
    value = found["primary"]["positive"]
    assert first == f"positive: positive {value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    assert second.endswith("bound 0.100: met")
