"""Every family of models is trained, mixed and decoded as plain transformers and PEFT have it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.families import BEGIN, CELLS, END, TOLERANCES, Row, try_family, write_table
from benchmarks.family_models import CONFIGS, make_model
from mpo_ray.data.tokens import collate
from mpo_ray.decoding.runner import MixtureRunner
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.policies.families import FAMILIES, Family, as_text
from mpo_ray.policies.mixture import mixture_of_one
from mpo_ray.policies.ragged_attention import NotInBlocksError, enable_packing

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
    assert [line.split("|")[1].strip() for line in table.strip().splitlines()[2:]] == [
        family.name for family in FAMILIES
    ]
    assert "wrong" not in table


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_list_says_how_a_family_is_run(family: Family) -> None:
    """In blocks where the engine takes a model of it; without padding where it packs and has no sliding windows."""
    model = make_model(family.name)
    assert model.config.model_type == family.model_type
    packs = family.packs and getattr(model.config, "sliding_window", None) is None
    assert enable_packing(make_model(family.name)) == packs
    try:
        MixtureRunner(mixture_of_one("only", model), max_num_seqs=1, context=1)
        in_blocks = True
    except NotInBlocksError:
        in_blocks = False
    assert in_blocks == family.in_blocks


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.packs], ids=lambda family: family.name)
def test_without_padding_a_family_has_the_log_probabilities_of_the_padded_batch(family: Family) -> None:
    batch = collate([([5, 9, 7], [8]), ([6] * 9, [5, 10, 11, 12]), ([7], [9, 9])], pad_id=0)
    packed, padded = CompletionModel(make_model(family.name)), CompletionModel(make_model(family.name))
    padded.packs = False
    with torch.no_grad():
        torch.testing.assert_close(packed(batch), padded(batch), atol=1e-4, rtol=1e-5)


def test_every_family_of_the_list_can_be_tried_and_is_shown() -> None:
    assert list(CONFIGS) == [family.name for family in FAMILIES]
    lines = as_text().splitlines()[1 : len(FAMILIES) + 1]
    for family, line in zip(FAMILIES, lines, strict=True):
        assert line.startswith(f"{family.name} ")
        assert ("in blocks" in line) == family.in_blocks
        assert line.endswith("not tested") != family.on_vllm


def test_a_family_that_is_decoded_otherwise_than_the_list_says_is_wrong() -> None:
    fine = {cell: TOLERANCES[cell] for cell in CELLS}
    assert Row("Llama", fine).wrong == []
    assert Row("Llama", fine, by_own_cache=True).wrong == ["decoded otherwise than families.py says"]
    assert Row("Mamba", fine).wrong == ["decoded otherwise than families.py says"]


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
