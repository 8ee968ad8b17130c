"""The report's part about MOPO: every number in its cell, cautions, and the picture of a sweep."""

from __future__ import annotations

from typing import Any

import pytest

from mpo_ray.evaluation.mopo_section import mopo_section, sweep_figure


def solved(bound: float, **changes: Any) -> dict[str, Any]:
    return {
        "primary": "positive",
        "bounds": {"concise": bound},
        "multipliers": {"concise": 0.25},
        "values": {"positive": 0.611, "concise": bound},
        "heldout_values": {"positive": 0.602, "concise": bound - 0.011},
        "pool_errors": {"positive": 0.123, "concise": 0.045},
        "warnings": [],
        **changes,
    }


def certificate(bound: float, verdict: str = "met") -> dict[str, Any]:
    return {
        "primary": {"positive": {"value": 0.7 - bound / 4, "low": 0.66 - bound / 4, "high": 0.75 - bound / 4}},
        "bounds": {
            "concise": {
                "bound": bound,
                "value": bound + 0.02,
                "low": bound + 0.001,
                "high": bound + 0.05,
                "verdict": verdict,
            }
        },
    }


def test_a_problem_has_a_line_for_every_objective() -> None:
    found = mopo_section({"p": solved(0.5)}, {"p": {"concise": 0.31}}, {"p": certificate(0.5)})
    assert len(found["table"]["columns"]) == 7
    assert found["table"]["rows"] == {
        "p: positive, maximised": ["", "", "0.611", "0.602", "0.575 [0.535, 0.625]", "", ""],
        "p: concise": ["0.250", "0.310", "0.500", "0.489", "0.520 [0.501, 0.550]", "0.500", "met"],
    }
    assert found["errors"] == "positive 0.123, concise 0.045"
    assert found["warnings"] == {}
    cautious = mopo_section({"p": solved(0.5, warnings=["ρ rests on few"])}, {"p": {}}, {"p": certificate(0.5)})
    assert cautious["table"]["rows"]["p: concise"][:2] == ["0.250", ""]
    assert cautious["warnings"] == {"p": ["ρ rests on few"]}


def test_a_sweep_is_drawn_in_the_order_of_its_bounds() -> None:
    """Both objectives with their intervals, and the bound itself as the diagonal."""
    figure = sweep_figure({str(b): certificate(b) for b in (0.6, 0.5, 0.55)})
    [axes] = figure.axes
    assert axes.get_xlabel() == "bound of concise"
    lines = [line.get_xydata().tolist() for line in axes.lines if len(line.get_xydata()) == 3]
    assert [pytest.approx(x) for x in ([0.5, 0.52], [0.55, 0.57], [0.6, 0.62])] in lines
    assert [pytest.approx(x) for x in ([0.5, 0.575], [0.55, 0.5625], [0.6, 0.55])] in lines
    assert [[0.5, 0.5], [0.55, 0.55], [0.6, 0.6]] in lines
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"positive", "concise", "the bound"}


def test_few_problems_make_no_picture() -> None:
    assert sweep_figure({"a": certificate(0.5), "b": certificate(0.6)}) is None
