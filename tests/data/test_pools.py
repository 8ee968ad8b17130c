"""Pools of design 5.2: the three formats, rows in any order, and what is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from mpo_ray.data.pools import open_pool, pool_from_table
from mpo_ray.data.score_files import ScoreTableError

COLUMNS = {
    "prompt_id": ["a", "b", "a", "b", "a"],
    "response_id": [0, 0, 1, 1, 2],
    "win_safe": [0.1, 0.2, 0.3, 0.4, 0.5],
    "win_good": [0.9, 0.8, 0.7, 0.6, 0.5],
}


def table(**changes: object) -> pa.Table:
    columns = {**COLUMNS, **changes}
    return pa.table({name: values for name, values in columns.items() if values is not None})


def written(directory: Path, kind: str) -> Path:
    path = directory / f"pool.{kind}"
    if kind == "parquet":
        pq.write_table(table(), path)
    elif kind == "csv":
        pyarrow.csv.write_csv(table(), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table().to_pylist()))
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_every_format_gives_the_same_pool_with_prompts_together(kind: str, tmp_path: Path) -> None:
    found = open_pool(str(written(tmp_path, kind)), "good", ["safe"])
    assert found.objectives == ("good", "safe")
    assert found.pool.starts.tolist() == [0, 3, 5]
    np.testing.assert_allclose(found.pool.primary, [0.9, 0.7, 0.5, 0.8, 0.6])
    np.testing.assert_allclose(found.pool.secondary[:, 0], [0.1, 0.3, 0.5, 0.2, 0.4])
    np.testing.assert_allclose(np.exp(found.pool.log_reference), [1 / 3] * 3 + [1 / 2] * 2)
    assert found.prompt_ids.to_pylist() == ["a", "a", "a", "b", "b"]
    assert [int(i) for i in found.response_ids.to_pylist()] == [0, 1, 2, 0, 1]


def test_log_ref_weighs_the_candidates_of_a_prompt() -> None:
    found = pool_from_table(table(log_ref=[-1.0, -700.0, -1.0, -701.0, -2.0]), "good", ["safe"])
    shares = np.exp(found.pool.log_reference)
    np.testing.assert_allclose(shares[3:], np.array([1.0, np.exp(-1.0)]) / (1 + np.exp(-1.0)))
    np.testing.assert_allclose(np.add.reduceat(shares, [0, 3]), 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"win_safe": None}, r"unknown objective 'safe': there is no column 'win_safe'. The pool has good"),
        ({"response_id": None}, r"no column 'response_id'"),
        ({"win_safe": [0.1, 0.2, 1.3, 0.4, 0.5]}, r"win_safe of prompt 'a', response 1 is 1.3; it must be a probabil"),
        ({"win_good": [0.1, None, 0.3, 0.4, 0.5]}, r"win_good of prompt 'b', response 0 is empty"),
        ({"win_good": [0.1, float("nan"), 0.3, 0.4, 0.5]}, r"win_good of prompt 'b', response 0 is nan"),
        (
            {"log_ref": [0.1, float("inf"), 0.3, 0.4, 0.5]},
            r"log_ref of prompt 'b', response 0 is inf; it must be a fin",
        ),
        ({"response_id": [0, 0, 1, 1, 1]}, r"prompt 'a' has the response 1 2 times"),
        ({"prompt_id": ["a", "b", "a", "c", "a"]}, r"2 of 3 prompts have a single candidate; the first is 'b'"),
        ({"win_good": ["x", "y", "z", "u", "v"]}, r"the column 'win_good' has the type string; it must hold numbers"),
        ({"prompt_id": ["a", None, "a", "b", "b"]}, r"prompt_id is empty in 1 rows"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_place(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ScoreTableError, match=message):
        pool_from_table(table(**changes), "good", ["safe"])


def test_a_pool_without_rows_is_refused() -> None:
    with pytest.raises(ScoreTableError, match="no rows; a pool has at least 2 candidates"):
        pool_from_table(table().slice(0, 0), "good", ["safe"])
