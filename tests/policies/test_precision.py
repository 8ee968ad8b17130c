"""One meaning of `auto`: the precision of the files, unless this machine is slower in it than in fp32."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from mpo_ray.config import Scoring
from mpo_ray.decoding.open_engine import open_engine
from mpo_ray.policies import precision, timed
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.policies.loading import load_model
from mpo_ray.policies.precision import PRECISIONS, own_precision, resolve
from tests.tiny import tiny_llama, tiny_lora, tiny_tokenizer


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same base in two precisions, and an adapter of it."""
    root = tmp_path_factory.mktemp("precision")
    base = tiny_llama(root / "fp32", tiny_tokenizer(), seed=0)
    half = load_model(str(base)).to(torch.bfloat16)
    half.save_pretrained(root / "bf16")
    tiny_tokenizer().save_pretrained(root / "bf16")
    return {"fp32": base, "bf16": root / "bf16", "adapter": tiny_lora(root / "adapter", base, seed=1)}


@pytest.fixture(params=[True, False], ids=["slow bf16", "fast bf16"])
def is_slower(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(precision, "_is_slower", lambda dtype: request.param)
    return bool(request.param)


def test_auto_is_the_files_own_unless_the_processor_is_slower_in_it(places: dict[str, Path], is_slower: bool) -> None:
    assert own_precision(places["bf16"]) == "bf16"
    assert resolve("auto", places["fp32"], "cpu") == "fp32"
    assert resolve("auto", places["bf16"], "cuda") == "bf16"
    assert resolve("auto", places["bf16"], "cpu") == ("fp32" if is_slower else "bf16")
    assert resolve("bf16", places["fp32"], "cpu") == "bf16"  # what is asked for is done


@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_an_artefact_has_the_precision_of_its_base_whatever_its_adapters_have(
    places: dict[str, Path], base: str, tmp_path: Path, is_slower: bool
) -> None:
    """And the engine opens it in that, or in what it is told to."""
    written = write_artefact(
        tmp_path,
        objectives={"only": places["adapter"]},
        reference=places[base],
        copy_reference=False,
        weights={"only": 1.0},
        fit={},
    )
    named = json.loads((tmp_path / "config.json").read_text())["dtype"]
    assert named == str(PRECISIONS[base]).removeprefix("torch.") == str(written.dtype).removeprefix("torch.")
    opened = open_engine(str(tmp_path), max_num_seqs=1)._runner
    assert _dtype(opened) == PRECISIONS[base if not is_slower else "fp32"]
    assert _dtype(open_engine(str(tmp_path), max_num_seqs=1, precision="bf16")._runner) == torch.bfloat16


def test_scoring_knows_the_same_precisions(places: dict[str, Path], is_slower: bool) -> None:
    for name in (*PRECISIONS, "auto"):
        wanted = Scoring(precision=name).precision
        opened = Ensemble(str(places["bf16"]), {"only": str(places["adapter"])}, precision=wanted)
        assert opened.precision == (name if name != "auto" else "fp32" if is_slower else "bf16")
        assert opened.stack is not None
        assert opened.stack.base.dtype == PRECISIONS[opened.precision]


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_the_products_are_timed(monkeypatch: pytest.MonkeyPatch, slow: torch.dtype) -> None:
    """The precision that takes longer is the slower one, whichever it is."""
    plain = torch.nn.functional.linear

    def linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        time.sleep(0.2 if rows.dtype == slow else 0.0)
        return plain(rows, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(timed, "TIMES", 1)
    assert precision._is_slower.__wrapped__(torch.bfloat16) == (slow == torch.bfloat16)


def _dtype(runner: object) -> torch.dtype:
    [branch] = runner._branches.values()  # type: ignore[attr-defined]
    return branch._model.dtype  # type: ignore[no-any-return]
