"""A live endpoint for clients that run in a process of their own."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from mpo_ray.decoding.protocol import GenerationRequest
from mpo_ray.serving.side_by_side import Batch, side_by_side
from tests.serving.live import Live, running, serving, write_tiny

KEY = "a-key-for-tests"


@dataclass(frozen=True)
class Endpoint:
    url: str
    key: str


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A tiny mixture of a context of 64 tokens, which asks for a key. No answer is empty, though it is drawn."""
    with running(write_tiny(tmp_path_factory.mktemp("clients"))) as live:
        live.generate = partial(long_enough, live)  # type: ignore[method-assign]
        digest = hashlib.sha256(KEY.encode()).hexdigest()
        with serving(live.app(key_digests=(digest,))) as url:
            yield Endpoint(f"{url}/v1", KEY)


def long_enough(live: Live, requests: Sequence[GenerationRequest]) -> AsyncGenerator[Batch]:
    """The endpoint's own way to its engine, for answers of at least four tokens, each of which is a word."""
    no_special = dict.fromkeys(live.tokenizer.all_special_ids, -100.0)  # their text is left out of an answer
    longer = [
        replace(
            one,
            sampling=replace(one.sampling, min_tokens=min(4, one.sampling.max_tokens), logit_bias=no_special),
        )
        for one in requests
    ]
    return side_by_side(live.engine, longer)


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parents[2]
