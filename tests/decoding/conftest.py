"""Mixtures of tiny models for the engine's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpo_ray.policies.mixture import MixtureForCausalLM
from tests.decoding.mixtures import KINDS
from tests.policies.material import make_material, write


@pytest.fixture(scope="package")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artefacts with three policies: all LoRA, all full, and mixed."""
    root = make_material(tmp_path_factory.mktemp("mixtures"))
    return {kind: write(root, root / f"artefact-{kind}", kind) for kind in KINDS}


@pytest.fixture(scope="package")
def plain(artefacts: dict[str, Path]) -> dict[str, MixtureForCausalLM]:
    """The mixtures as transformers models: what the engine is compared with."""
    return {kind: MixtureForCausalLM.from_pretrained(path) for kind, path in artefacts.items()}
