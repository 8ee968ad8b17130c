"""Score tables from files of every format, of any order of rows, of any size."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpo_ray.data import score_files, score_rows, scores
from mpo_ray.data.score_files import ScoreTableError
from mpo_ray.data.scores import ScoreTable, open_scores, scores_from_table
from tests.data.score_tables import WRITERS, Rows, as_jsonl, write


def random_rows(rng: np.random.Generator, *, num_prompts: int = 6) -> Rows:
    """A table with 2 to 6 samples of each prompt, two of them of π_ref, all optional columns and a text with commas."""
    rows = []
    for prompt in range(num_prompts):
        for sample in range(int(rng.integers(2, 7))):
            row: dict[str, Any] = {"response": f'one,\n"{rng.integers(9)}" é', "prompt_id": f"p{prompt}"}
            row |= {"sample_id": 3 * sample - 1, "proposal": "reference" if sample < 2 else str(rng.choice(["a", "b"]))}
            row |= {name: float(rng.normal(0, 5)) for name in ("log_ratio_b", "log_ratio_a", "reward_a", "log_ref")}
            rows.append({**row, "reward_b": int(rng.integers(5)), "num_tokens": int(rng.integers(1, 99))})
    return rows


def by_prompt(table: ScoreTable) -> dict[str, Any]:
    """All that a table holds of each prompt, to be compared whatever the order of the prompts."""
    found = {}
    for number, prompt in enumerate(table.prompt_ids.to_pylist()):
        rows = slice(table.starts[number], table.starts[number + 1])
        values = [table.log_ratios, table.rewards, table.log_proposal, table.log_ref, table.num_tokens]
        drawn_by = [table.proposals[code] for code in table.drawn_by[rows]]
        found[prompt] = [drawn_by, *(None if array is None else array[rows].tolist() for array in values)]
    return found


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few rows at a time that a table of some 25 rows takes many batches, blocks and rounds."""
    monkeypatch.setattr(score_files, "BATCH_ROWS", 4)
    monkeypatch.setattr(score_files, "BLOCK_BYTES", 600)
    monkeypatch.setattr(score_rows, "PENDING_TEXTS", 2)
    monkeypatch.setattr(scores, "BLOCK_ROWS", 3)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("ending", list(WRITERS))
@pytest.mark.parametrize("seed", range(4))
def test_a_table_is_the_same_in_any_format_order_of_rows_and_split_into_files(
    ending: str, seed: int, tmp_path: Path
) -> None:
    """Every prompt has the same rows in the order of sample_id, bit for bit."""
    rng = np.random.default_rng(seed)
    rows = random_rows(rng)
    whole = by_prompt(scores_from_table(pa.Table.from_pylist(rows), ["a", "b"]))
    assert list(whole) == [f"p{number}" for number in range(6)], "prompts stand in the order of first appearance"
    for prompt, (_, log_ratios, rewards, _, log_ref, num_tokens) in whole.items():
        own = [row for row in rows if row["prompt_id"] == prompt]
        assert log_ratios == [[row["log_ratio_a"], row["log_ratio_b"]] for row in own]
        assert rewards == [[row["reward_a"], row["reward_b"]] for row in own]
        assert (log_ref, num_tokens) == ([row["log_ref"] for row in own], [row["num_tokens"] for row in own])

    shuffled = [rows[number] for number in rng.permutation(len(rows))]
    cuts = [0, *sorted(rng.integers(1, len(rows), 2).tolist()), len(rows)]
    parts = [shuffled[first:last] for first, last in itertools.pairwise(cuts) if first < last]
    parts_of = tmp_path / "parts"
    parts_of.mkdir()
    for number, part in enumerate(parts):
        write(parts_of / f"part-{number}{ending}", part)
    for paths in (str(parts_of), str(parts_of / f"part-*{ending}"), write(tmp_path / f"all{ending}", shuffled)):
        assert by_prompt(open_scores(paths, ["a", "b"])) == whole


def test_files_are_read_by_url_and_from_lists(tmp_path: Path) -> None:
    rows = random_rows(np.random.default_rng(1))
    whole = by_prompt(scores_from_table(pa.Table.from_pylist(rows)))
    fsspec.filesystem("memory").pipe("/scores-test/a.jsonl", as_jsonl(rows[:9]))
    rest = write(tmp_path / "b.csv", rows[9:])
    assert by_prompt(open_scores(["memory://scores-test/a.jsonl", f"file://{rest}"])) == whole


def test_the_objectives_are_the_columns_in_the_order_of_the_file_unless_they_are_named() -> None:
    table = pa.Table.from_pylist(random_rows(np.random.default_rng(2)))
    assert scores_from_table(table).objectives == ("b", "a")
    found = scores_from_table(table, ["a", "b"])
    assert found.objectives == ("a", "b")
    assert (found.log_ratios == scores_from_table(table).log_ratios[:, ::-1]).all()
    assert found.samples("balanced", ["b"]).log_ratios.tolist() == found.log_ratios[:, 1:].tolist()


def test_log_proposal_is_the_mixture_of_who_drew_the_prompts_rows() -> None:
    """Eq. 6a by hand, for two responses: π_ref = (1/2, 1/2), π_a = (3/4, 1/4), π_b = (1/8, 7/8).

    Prompt p, one row of each of π_ref and π_a: p̄ = (5/8, 3/8).
    Prompt q, one of π_a and two of π_b: p̄ = (3/4 + 2/8, 1/4 + 14/8)/3 = (1/3, 2/3).
    """
    ratio = {"a": np.log([3 / 2, 1 / 2]), "b": np.log([1 / 4, 7 / 4])}
    drawn = [("p", 0, "reference", 0), ("p", 1, "a", 1), ("q", 5, "b", 1), ("q", 2, "a", 0), ("q", 3, "b", 1)]
    rows = [
        {"prompt_id": p, "sample_id": s, "proposal": by, **{f"log_ratio_{k}": ratio[k][y] for k in "ab"}}
        for p, s, by, y in drawn
    ]
    table = scores_from_table(pa.Table.from_pylist(rows))
    expected = np.log([(5 / 8) * 2, (3 / 8) * 2, (1 / 3) * 2, (2 / 3) * 2, (2 / 3) * 2])
    np.testing.assert_allclose(table.samples("balanced").log_proposal, expected, rtol=0, atol=1e-12)
    assert table.samples("balanced").starts.tolist() == [0, 2, 5]
    assert table.proposal_rows() == {"reference": 1, "a": 2, "b": 2}


def test_a_proposal_that_is_no_chosen_objective_still_counts() -> None:
    """p̄ holds π_k for whoever drew a row; to leave k out of the objectives changes no weight of the estimator."""
    table = pa.Table.from_pylist(random_rows(np.random.default_rng(3)))
    every = scores_from_table(table, ["a", "b"])
    one = scores_from_table(table, ["b"], min_objectives=1)
    assert (one.log_proposal == every.log_proposal).all()
    assert (every.samples("balanced", ["b"]).log_proposal == every.log_proposal).all()
    assert one.log_ratios.tolist() == every.log_ratios[:, 1:].tolist()


def test_the_papers_estimator_takes_the_rows_of_the_reference_alone() -> None:
    rows = random_rows(np.random.default_rng(4))
    table, of_reference = (
        scores_from_table(pa.Table.from_pylist(some))
        for some in (rows, [row for row in rows if row["proposal"] == "reference"])
    )
    samples = table.samples("paper")
    assert samples.log_ratios.tolist() == of_reference.log_ratios.tolist()
    assert samples.starts.tolist() == of_reference.starts.tolist()
    assert not samples.log_proposal.any()
    assert table.log_ratios[table.rows("paper")].tolist() == samples.log_ratios.tolist()


def test_rows_without_a_proposal_are_the_references_and_both_estimators_are_one() -> None:
    """p̄ = π_ref, so log p̄/π_ref = 0 exactly, and no array is copied."""
    rows = pa.Table.from_pylist(random_rows(np.random.default_rng(5))).drop_columns(["proposal"])
    table = scores_from_table(rows)
    paper, balanced = table.samples("paper"), table.samples("balanced")
    assert table.proposals == ("reference",)
    assert paper.log_ratios is balanced.log_ratios is table.log_ratios
    assert not paper.log_proposal.any()
    assert not balanced.log_proposal.any()


def test_optional_columns_may_be_absent() -> None:
    """Rewards are there only if every objective has them."""
    rows = pa.Table.from_pylist(random_rows(np.random.default_rng(6)))
    bare = scores_from_table(rows.drop_columns(["reward_a", "log_ref", "num_tokens"]))
    assert (bare.rewards, bare.log_ref, bare.num_tokens) == (None, None, None)


def test_numbers_and_ids_may_have_any_numeric_type_and_ids_are_texts() -> None:
    """Whole numbers as prompt ids, floats from a table that once had gaps, single precision, dictionaries."""
    columns = {
        "prompt_id": pa.array([7, 7, 12, 12], pa.int64()),
        "sample_id": pa.array([0.0, 1.0, 0.0, 1.0]),
        "proposal": pa.array(["reference", "a", "reference", "a"]).dictionary_encode(),
        "log_ratio_a": pa.array([1, 2, 3, 4], pa.float32()),
        "log_ratio_b": pa.array([1, 2, 3, 4], pa.int8()),
    }
    table = scores_from_table(pa.table(columns))
    assert table.prompt_ids.to_pylist() == ["7", "12"]
    assert table.log_ratios.tolist() == [[1, 1], [2, 2], [3, 3], [4, 4]]
    texts = scores_from_table(pa.table({**columns, "prompt_id": ["7", "7", "12", "12"]}))
    assert by_prompt(texts) == by_prompt(table)


def test_json_ids_may_be_whole_numbers(tmp_path: Path) -> None:
    rows = [{"prompt_id": 3, "sample_id": s, "log_ratio_a": s, "log_ratio_b": 0.5} for s in range(2)]
    assert open_scores(write(tmp_path / "a.jsonl", rows)).prompt_ids.to_pylist() == ["3"]


# ---- large tables ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_batches")
def test_above_the_limit_values_lie_in_a_file_that_goes_with_the_last_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 in a mapped file without a name, also for the rows that an estimator copies; float64 below the limit."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows = pa.Table.from_pylist(random_rows(np.random.default_rng(7)))
    in_memory, in_file = scores_from_table(rows), scores_from_table(rows, memory_limit=0)
    assert in_memory.log_ratios.dtype == np.float64
    assert in_file.log_ratios.dtype == in_file.log_proposal.dtype == np.float32
    assert (in_file.log_ratios == in_memory.log_ratios.astype(np.float32)).all()
    samples = in_file.samples("paper", ["a"])
    assert (samples.log_ratios == in_memory.samples("paper", ["a"]).log_ratios.astype(np.float32)).all()
    assert list(tmp_path.iterdir()) == []
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path) in maps.read_text()
        del in_file
        gc.collect()
        assert str(tmp_path) in maps.read_text(), "the copied samples outlive the table they come from"
        assert np.isfinite(samples.log_ratios).all()
        del samples
        gc.collect()
        assert str(tmp_path) not in maps.read_text()


def test_a_full_disk_is_named_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    rows = pa.Table.from_pylist(random_rows(np.random.default_rng(7)))
    with pytest.raises(ScoreTableError, match=r"no room for .* GiB of scores \(No space left on device\). Set TMPDIR"):
        scores_from_table(rows, memory_limit=0)


def test_a_parquet_file_is_never_in_memory_whole_even_if_it_is_one_row_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Arrow holds at any batch, and Python at most, is a small part of the table."""
    monkeypatch.setattr(score_files, "BATCH_ROWS", 2048)
    monkeypatch.setattr(score_files, "READ_BYTES", 1 << 14)
    rng = np.random.default_rng(8)
    num_rows = 80_000
    columns = {f"log_ratio_{k}": pa.array(rng.normal(size=num_rows)) for k in range(8)}
    ids = {"prompt_id": pa.array(np.arange(num_rows) // 16).cast(pa.string()), "sample_id": np.arange(num_rows) % 16}
    table = pa.table({**ids, **columns})
    pq.write_table(
        table, tmp_path / "scores.parquet", row_group_size=num_rows, use_dictionary=False, data_page_size=1 << 14
    )
    size = table.nbytes
    del table, columns, ids
    (file,) = score_files.open_files(str(tmp_path / "scores.parquet"))
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    allocated = [pa.total_allocated_bytes() - before for _ in file.batches(file.columns)]
    _, in_python = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(allocated) > 20
    assert max(allocated) + in_python < size / 5


def test_a_prompt_s_number_is_the_same_id_as_an_integer_as_a_float_and_as_text() -> None:
    """pandas makes floats of integers on the way; ids such as 1.5 are refused as before."""
    rows = random_rows(np.random.default_rng(0))
    numbers = [int(row["prompt_id"].removeprefix("p")) for row in rows]
    found = []
    for ids in (pa.array(numbers), pa.array([float(n) for n in numbers]), pa.array([str(n) for n in numbers])):
        table = pa.Table.from_pylist([{**row, "prompt_id": None} for row in rows])
        table = table.set_column(table.column_names.index("prompt_id"), "prompt_id", ids)
        found.append(by_prompt(scores_from_table(table, ["a", "b"])))
    assert found[0] == found[1] == found[2]
    assert next(iter(found[0])) == str(numbers[0])
