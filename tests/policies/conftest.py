"""What the tests of the mixture share: the policies on disk, and an artefact of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.policies.material import make_material, write
from tests.tiny import tiny_llama, tiny_lora, tiny_tokenizer


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference, three LoRA policies and three full ones: read, and linked to, but never changed."""
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module", params=["lora", "full", "mixed"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def artefact(material: Path, kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(material, tmp_path_factory.mktemp("artefact") / kind, kind)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base with an output layer of its own, one whose output layer is its embeddings, and an adapter of each."""
    root = tmp_path_factory.mktemp("given")
    for name, tied in (("untied", False), ("tied", True)):
        base = tiny_llama(root / name, tiny_tokenizer(), seed=0, tie_word_embeddings=tied, attention_bias=True)
        tiny_lora(root / f"plain_{name}", base, seed=7)
    return {path.name: path for path in root.iterdir()}
