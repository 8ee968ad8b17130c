"""The score table as an array."""

import numpy as np
import pyarrow as pa
import pytest

from mpo_ray.data.scores import read_log_ratios
from mpo_ray.data.sources import DataError

ROWS = [
    {"prompt_id": p, "sample_id": s, "log_ratio_a": 10 * i + s, "log_ratio_b": -(10.0 * i + s)}
    for i, p in enumerate(["p", "q"])
    for s in range(3)
]


def test_rows_in_any_order_give_the_same_array() -> None:
    expected = np.array([[[10 * i + s, -(10 * i + s)] for s in range(3)] for i in range(2)], dtype=float)
    shuffled = [ROWS[i] for i in (4, 0, 5, 2, 1, 3)]
    assert (read_log_ratios(pa.Table.from_pylist(shuffled), ["a", "b"]) == expected).all()


def test_a_missing_column_is_named() -> None:
    with pytest.raises(DataError, match="no column 'log_ratio_c'"):
        read_log_ratios(pa.Table.from_pylist(ROWS), ["a", "c"])


def test_uneven_prompts_are_refused() -> None:
    with pytest.raises(DataError, match="from 2 to 3 samples"):
        read_log_ratios(pa.Table.from_pylist(ROWS[1:]), ["a"])


def test_a_value_that_is_not_finite_is_named_with_its_prompt() -> None:
    rows = [*ROWS[:-1], {**ROWS[-1], "log_ratio_b": float("-inf")}]
    with pytest.raises(DataError, match="log_ratio_b of prompt q is -inf"):
        read_log_ratios(pa.Table.from_pylist(rows), ["a", "b"])
