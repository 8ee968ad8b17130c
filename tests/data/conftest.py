"""Rows of the tests of data, as a file that is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpo_ray.config_training import Source
from mpo_ray.data.comparisons import Parsed, read_comparisons


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """Write rows as JSONL and read them for objective `kind`."""

    def write_and_read(*rows: object, objective: str = "kind", label: str | None = None) -> Parsed:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        parsed = read_comparisons(Source(path=str(path)), objective, label)
        used = len(parsed.comparisons) * (2 if parsed.form == "ratings" else 1)
        assert parsed.num_rows == used + len(parsed.refused) + sum(parsed.skipped.values()) == len(rows)
        return parsed

    return write_and_read
