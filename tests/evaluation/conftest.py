"""What the tests of the judge share."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpo_ray.evaluation.judge_cache import AnswerCache


@pytest.fixture
def cache(tmp_path: Path) -> AnswerCache:
    return AnswerCache(tmp_path / "cache.jsonl")
