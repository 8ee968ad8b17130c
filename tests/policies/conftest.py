"""What the tests of the mixture share: the policies on disk, and an artefact of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.policies.material import make_material, write


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
