"""Every family of models is trained, mixed and decoded as plain transformers and PEFT have it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.families import BEGIN, CELLS, END, TOLERANCES, Row, try_family, write_table
from benchmarks.family_models import FAMILIES

#: One of each kind: plain, layers that flatten their rows, transposed layers, a window in the mask alone, a state,
#: expert parameters. `python -m benchmarks.families` tries all of them.
CHOSEN = ("Llama", "Qwen2-MoE", "GPT-2", "Phi-MoE", "LFM2", "Mixtral")
PROJECT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("family", CHOSEN)
def test_what_a_run_does_with_a_family_is_the_product_of_its_policies(family: str, tmp_path: Path) -> None:
    """First DPO loss log 2; log-probabilities of engine, `generate` and sampler to 1e-4 of the explicit product."""
    row = try_family(family, tmp_path)
    assert row.refused is None
    assert row.wrong == [], row.differences


def test_the_document_has_every_family_and_no_wrong_cell() -> None:
    text = (PROJECT / "docs" / "models.md").read_text(encoding="utf-8")
    table = text.partition(BEGIN)[2].partition(END)[0]
    assert [line.split("|")[1].strip() for line in table.strip().splitlines()[2:]] == list(FAMILIES)
    assert "wrong" not in table


def test_a_difference_that_is_too_large_or_no_number_is_wrong(tmp_path: Path) -> None:
    fine = Row("Fine", {cell: TOLERANCES[cell] for cell in CELLS})
    off = Row("Off", {**fine.differences, "engine": 2e-4, "generate": float("nan")})
    assert (fine.wrong, off.wrong) == ([], ["engine", "generate"])
    document = tmp_path / "models.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    write_table(document, [fine, off, Row("No", refused="it cannot")])
    written = document.read_text(encoding="utf-8")
    assert "| Fine | equal | 1e-04" in written
    assert "| Off | **wrong**: engine, generate |" in written
    assert "| No | refused by `check`: it cannot |" in written
    assert "old" not in written
    assert written.startswith("before\n")
    assert written.endswith("after\n")
