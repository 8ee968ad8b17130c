"""The servers that the tests of the endpoint share: one whose tokens are words, and one whose tokens are bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.live import Live, byte_tokenizer, running, write_tiny


@pytest.fixture(scope="session")
def word_artefact(tmp_path_factory: pytest.TempPathFactory, engine_name: str) -> Path:
    return write_tiny(tmp_path_factory.mktemp("words"), engine=engine_name)


@pytest.fixture(scope="session")
def live(word_artefact: Path, engine_name: str) -> Iterator[Live]:
    """Keyless, on loopback; a context of 64 tokens."""
    with running(word_artefact, engine_name) as here:
        yield here


@pytest.fixture(scope="session")
def live_bytes(tmp_path_factory: pytest.TempPathFactory, engine_name: str) -> Iterator[Live]:
    with running(write_tiny(tmp_path_factory.mktemp("bytes"), byte_tokenizer(), engine_name), engine_name) as here:
        yield here
