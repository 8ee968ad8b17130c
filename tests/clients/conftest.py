"""A live endpoint for clients that run in a process of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.serving.live import running, serving, write_tiny

KEY = "a-key-for-tests"


@dataclass(frozen=True)
class Endpoint:
    url: str
    key: str


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A tiny mixture of a context of 64 tokens, which asks for a key."""
    with running(write_tiny(tmp_path_factory.mktemp("clients"))) as live:
        digest = hashlib.sha256(KEY.encode()).hexdigest()
        with serving(live.app(key_digests=(digest,))) as url:
            yield Endpoint(f"{url}/v1", KEY)


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parents[2]
