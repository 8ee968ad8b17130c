"""The judge's part of the report: its numbers are there, what is missing is said, and its model's name is only text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpo_ray.evaluation.estimates import number
from mpo_ray.evaluation.judgements import Outcome, judged_candidates
from tests.evaluation.test_report import Page, report, squeezed
from tests.evaluation.world import OBJECTIVES

WIN, LOSS, FIRST = Outcome("win", 1.0), Outcome("loss", 0.0), Outcome("first", 0.5)
MISSING = Outcome("missing", None)


def judged(model: str = "judge-1") -> dict[str, Any]:
    rows = {"mpo": [WIN, WIN, FIRST, MISSING], "concise": [LOSS, WIN, FIRST, MISSING], "detailed": [MISSING] * 4}
    outcomes = {name: dict.fromkeys(OBJECTIVES, row) for name, row in rows.items()}
    candidates = judged_candidates(outcomes, draws=50, confidence=0.9, seed=0)
    return {
        "model": model,
        "objectives": OBJECTIVES,
        "num_prompts": 4,
        "candidates": {name: candidate.as_json() for name, candidate in candidates.items()},
        "remarks": ["18 of 36 comparisons are missing"],
    }


def test_the_page_shows_win_rates_counts_and_remarks_of_the_judge(tmp_path: Path) -> None:
    page = Page(report(tmp_path, judge=judged()))
    text = squeezed(page.text)
    assert page.headings[:3] == ["Candidates", "Judge", "Weights"]
    assert "win rate, judged by judge-1 positive concise detailed minimum" in text
    rate = judged()["candidates"]["mpo"]["win_rates"]["positive"]
    assert rate["value"] == 2.5 / 3
    assert f"MPO mixture {number(rate['value'])} [{number(rate['low'])}, {number(rate['high'])}]" in text
    assert "detailed policy – – – –" in text
    assert "MPO mixture: positive 2 0 0 1 0 0 0 0 1 33 %" in text.replace("\u2009", " ")
    assert "detailed policy: concise 0 0 0 0 0 0 0 0 4 –" in text
    assert "18 of 36 comparisons are missing" in text


def test_a_model_name_that_is_markup_is_text(tmp_path: Path) -> None:
    page = Page(report(tmp_path, judge=judged("<script>alert(1)</script>")))
    assert "script" not in page.tags


def test_without_a_judge_there_is_no_such_part(tmp_path: Path) -> None:
    assert "Judge" not in Page(report(tmp_path)).headings
