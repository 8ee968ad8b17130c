"""A minimal run file for tests, and what is said of a wrong one."""

from __future__ import annotations

from typing import Any

import pytest

from mpo_ray.config import ConfigError
from mpo_ray.run_file import parse_config

MINIMAL: dict[str, Any] = {
    "name": "trial",
    "reference": {"model": "embedded"},
    "objectives": {
        "helpful": {"preferences": {"embedded": "pairs"}},
        "harmless": {"preferences": {"path": ["a.jsonl", "b.jsonl.gz"]}, "reward": "rewards:harmless"},
    },
}


def complaint(raw: object, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, overrides, where="run.yaml")
    return str(caught.value)
