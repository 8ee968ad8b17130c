"""The servers that the tests of the endpoint share: one whose tokens are words, and one whose tokens are bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.live import Live, byte_tokenizer, running, write_tiny


@pytest.fixture(scope="session")
def word_artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="session")
def live(word_artefact: Path) -> Iterator[Live]:
    """Keyless, on loopback; a context of 64 tokens."""
    with running(word_artefact) as here:
        yield here


@pytest.fixture(scope="session")
def live_bytes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(write_tiny(tmp_path_factory.mktemp("bytes"), byte_tokenizer())) as here:
        yield here
