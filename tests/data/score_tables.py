"""Score tables for tests, as rows and as files of every format."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = list[dict[str, Any]]


def as_csv(rows: Rows) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows: Rows) -> bytes:
    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), data, row_group_size=5)
    return data.getvalue()


WRITERS: dict[str, Callable[[Rows], bytes]] = {
    ".parquet": as_parquet,
    ".csv": as_csv,
    ".jsonl": as_jsonl,
    ".csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    ".jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)),
}


def write(path: Path, rows: Rows) -> str:
    path.write_bytes(WRITERS["".join(path.suffixes)](rows))
    return str(path)
