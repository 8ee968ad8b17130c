"""A soup that is exported: a plain transformers model with the average's parameters, which says that it is a soup."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo_ray.policies.loading import ModelError
from mpo_ray.policies.plain_model import write_soup, written_whole
from mpo_ray.policies.soup import load_soup
from tests.policies.material import WEIGHTS, ids_of, paths, write

OTHER = {"positive": 0.1, "concise": 0.6, "detailed": 0.3}


@pytest.mark.parametrize("weights", [None, OTHER])
def test_the_exported_soup_is_the_average_and_says_so(
    material: Path, kind: str, tmp_path: Path, weights: dict[str, float] | None
) -> None:
    """θ = Σ_k λ_k θ_k, as AutoModelForCausalLM loads it; config.json and README.md name λ, and what it is not."""
    artefact = write(material, tmp_path / "artefact", kind)
    label = write_soup(artefact, tmp_path / "soup", weights)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "soup")
    policies = {name: str(path) for name, path in paths(material, kind).items()}
    expected = load_soup(str(material / "reference"), policies, weights or WEIGHTS).state_dict()
    for key, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[key])
    assert loaded.config.mpo_ray == label
    assert label["kind"] == "soup"
    assert label["weights"] == (weights or WEIGHTS)
    assert json.loads((tmp_path / "soup" / "config.json").read_text())["model_type"] == "llama"
    assert "It is not the mixture" in (tmp_path / "soup" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "soup")("the film was").input_ids == ids_of(artefact)
    assert list(tmp_path.glob(".partial-*")) == []


def test_a_directory_with_something_in_it_is_left_alone(material: Path, tmp_path: Path) -> None:
    artefact = write(material, tmp_path / "artefact", "lora")
    with pytest.raises(ModelError, match="is there already"):
        write_soup(artefact, artefact, None)
    with pytest.raises(ValueError, match=r"sum to 0\.5, not 1"):
        write_soup(artefact, tmp_path / "new", {"positive": 0.5})
    assert not (tmp_path / "new").exists()


def test_what_is_broken_off_leaves_nothing(tmp_path: Path) -> None:
    def broken_off() -> None:
        with written_whole(tmp_path / "out") as directory:
            (directory / "half").write_text("half")
            raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        broken_off()
    assert list(tmp_path.iterdir()) == []
