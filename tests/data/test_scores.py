"""Score tables from files of every format, of any order of rows, of any size; what is refused, and how."""

from __future__ import annotations

import csv
import errno
import gc
import gzip
import io
import itertools
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
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

Rows = list[dict[str, Any]]


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


# ---- refusals ----------------------------------------------------------------------------------------------------

GOOD: Rows = [
    {
        "prompt_id": p,
        "sample_id": s,
        "proposal": by,
        "log_ratio_help": 1.0 + s,
        "log_ratio_harm": -1.0,
        "reward_help": 0.5,
    }
    for p in ("p", "q")
    for s, by in enumerate(("reference", "reference", "help"))
]
MEMORY = "score table"


def changed(row: int, **cells: Any) -> Rows:
    return [{**cells_of, **(cells if number == row else {})} for number, cells_of in enumerate(GOOD)]


def without(*columns: str) -> Rows:
    return [{key: value for key, value in row.items() if key not in columns} for row in GOOD]


def error_of(rows: Rows | pa.Table, objectives: Sequence[str] | None = None) -> str:
    with pytest.raises(ScoreTableError) as caught:
        scores_from_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), objectives)
    return str(caught.value)


def file_error(path: Path, rows: Rows | bytes) -> str:
    if isinstance(rows, bytes):
        path.write_bytes(rows)
    else:
        write(path, rows)
    with pytest.raises(ScoreTableError) as caught:
        open_scores(str(path))
    return str(caught.value)


def test_the_table_that_the_refusals_change_is_accepted() -> None:
    assert scores_from_table(pa.Table.from_pylist(GOOD)).num_rows == 6


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScoreTableError, match=r"none\.parquet: no such file\. Paths are relative to"):
        open_scores(str(tmp_path / "none.parquet"))


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "scores.xlsx").write_text("x")
    with pytest.raises(ScoreTableError, match=r"scores\.xlsx: unknown kind of file. Known are .parquet, .csv, .jsonl"):
        open_scores(str(tmp_path / "scores.xlsx"))
    (tmp_path / "scores.parquet.gz").write_text("x")
    with pytest.raises(ScoreTableError, match=r"a Parquet file is compressed within; unpack it with gunzip"):
        open_scores(str(tmp_path / "scores.parquet.gz"))


def test_other_files_of_a_directory_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "fit.json").write_text("{}")
    write(tmp_path / "scores.parquet", GOOD)
    assert open_scores(str(tmp_path)).num_rows == 6


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
def test_a_missing_column_is_named_with_the_nearest(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"scores{ending}"
    assert file_error(path, without("prompt_id")).startswith(
        f"{path}: no column 'prompt_id'; Its columns are sample_id"
    )
    rows = [{("promptid" if key == "prompt_id" else key): value for key, value in row.items()} for row in GOOD]
    assert f"{path}: no column 'prompt_id'; did you mean 'promptid'? Its columns are promptid," in file_error(
        path, rows
    )


def test_an_objective_without_a_column_is_named_with_the_nearest() -> None:
    assert (
        f"{MEMORY}: no column 'log_ratio_helpful'; did you mean 'log_ratio_help'? Its columns are prompt_id, sample_id"
        in error_of(GOOD, ["helpful", "harm"])
    )


def test_a_column_that_only_some_files_have_is_named(tmp_path: Path) -> None:
    write(tmp_path / "1.csv", GOOD)
    write(tmp_path / "2.csv", [{**row, "sample_id": 9, "log_ref": -1.0} for row in GOOD[2::3]])
    with pytest.raises(ScoreTableError, match=r"1\.csv: no column 'log_ref'"):
        open_scores(str(tmp_path))


def test_files_without_the_column_proposal_hold_samples_of_the_reference(tmp_path: Path) -> None:
    """The paper's samples, and later ones of the policies in a file beside them, are one mixed table."""
    write(tmp_path / "1.csv", without("proposal"))
    write(tmp_path / "2.csv", [{**row, "sample_id": row["sample_id"] + 3, "proposal": "harm"} for row in GOOD])
    assert open_scores(str(tmp_path)).proposal_rows() == {"reference": 6, "harm": 6}


def test_a_table_without_log_ratios_is_refused() -> None:
    assert f"{MEMORY}: no column log_ratio_<objective>; its columns are prompt_id, sample_id" in error_of(
        without("log_ratio_help", "log_ratio_harm")
    )


def test_one_objective_is_refused_unless_it_is_allowed() -> None:
    assert f"{MEMORY}: the only objective is 'help'; there is nothing to weigh." in error_of(GOOD, ["help"])
    assert "the only objective is 'help'" in error_of(without("log_ratio_harm"))
    table = scores_from_table(pa.Table.from_pylist(GOOD), ["help"], min_objectives=1)
    assert table.samples("balanced").num_objectives == 1


def test_an_objective_that_is_named_twice_is_refused() -> None:
    assert "objectives help, harm, help: one is named twice" in error_of(GOOD, ["help", "harm", "help"])


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
def test_a_table_without_rows_is_refused(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"scores{ending}"
    empty = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(GOOD)[:0], empty)
    data = {".parquet": empty.getvalue(), ".csv": as_csv(GOOD[:1]).splitlines()[0] + b"\n", ".jsonl": b"\n"}[ending]
    reason = "holds no rows." if ending == ".jsonl" else "the score table has no rows; there is nothing to fit"
    assert f"{path}: {reason}" in file_error(path, data)


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize(
    ("value", "seen"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf"), (None, "empty")]
)
@pytest.mark.parametrize("column", ["log_ratio_harm", "reward_help"])
def test_a_value_that_is_not_finite_is_named_with_its_place(
    ending: str, value: float | None, seen: str, column: str, tmp_path: Path
) -> None:
    path = tmp_path / f"scores{ending}"
    rows = [{**row, "reward_harm": 0.0} for row in changed(4, **{column: value})]
    expected = f"{path} row 5: {column} of prompt 'q', sample 1 is {seen}; it must be a finite number."
    assert expected in file_error(path, rows)


def test_the_row_of_a_bad_value_counts_within_its_file(tmp_path: Path) -> None:
    write(tmp_path / "1.csv", GOOD[:3])
    write(tmp_path / "2.csv", changed(4, log_ratio_help="inf")[3:])
    with pytest.raises(ScoreTableError, match=r"2\.csv row 2: log_ratio_help of prompt 'q', sample 1 is inf"):
        open_scores(str(tmp_path))


@pytest.mark.parametrize(
    ("column", "value", "seen"),
    [
        ("log_ratio_help", "many", "log_ratio_help of prompt 'q', sample 1 is 'many'; it must be a finite number"),
        ("sample_id", 1.5, "sample_id of prompt 'q', sample 1.5 is {}1.5{}; it must be a whole number"),
        ("sample_id", "one", "sample_id of prompt 'q', sample one is 'one'; it must be a whole number"),
    ],
)
def test_what_is_no_number_is_named_with_its_line(column: str, value: Any, seen: str, tmp_path: Path) -> None:
    """Text formats are read a second time to say where."""
    rows, path = changed(4, **{column: value}), tmp_path / "scores.csv"
    assert f"{path}:6: {seen.format(*chr(39) * 2)}" in file_error(path, rows)
    path = tmp_path / "scores.jsonl"
    assert f"{path}:5: {seen.format('', '')}" in file_error(path, rows)


def test_columns_of_a_wrong_type_are_named() -> None:
    table = pa.Table.from_pylist(GOOD)
    texts, halves = pa.array(["x"] * 6), pa.array([0.5] * 6)
    for column, values, wanted in [
        ("log_ratio_harm", texts, "has the type string; it must hold numbers"),
        ("prompt_id", halves, "has the type double; it must hold texts or whole numbers"),
        ("proposal", halves, "has the type double; it must hold texts"),
        ("sample_id", texts, "has the type string; it must hold whole numbers"),
    ]:
        replaced = table.set_column(table.column_names.index(column), column, values)
        assert f"{MEMORY}: the column '{column}' {wanted}." in error_of(replaced)


def test_sample_ids_that_are_not_whole_are_named() -> None:
    assert f"{MEMORY} row 2: sample_id of prompt 'p', sample ? is 1.25; it must be a whole number" in error_of(
        [{**row, "sample_id": row["sample_id"] * 1.25} for row in GOOD]
    )
    assert f"{MEMORY} row 2: sample_id of prompt 'p', sample ? is empty" in error_of(changed(1, sample_id=None))


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("column", ["prompt_id", "proposal"])
@pytest.mark.parametrize("value", [None, ""])
def test_an_empty_key_is_named(ending: str, column: str, value: str | None, tmp_path: Path) -> None:
    path = tmp_path / f"scores{ending}"
    error = file_error(path, changed(3, **{column: value}))
    assert error.startswith(f"{path} row 4: {column} is empty.")


def test_a_pair_of_prompt_and_sample_that_is_there_twice_is_named_with_both_rows(tmp_path: Path) -> None:
    write(tmp_path / "1.csv", changed(5, sample_id=9)[::-1])
    write(tmp_path / "2.csv", GOOD[4:5])
    with pytest.raises(ScoreTableError) as caught:
        open_scores(str(tmp_path))
    assert str(caught.value).startswith(
        f"prompt 'q', sample 1 is there twice: {tmp_path}/1.csv row 2 and {tmp_path}/2.csv row 1. Leave one out"
    )
    assert "prompt 'p', sample 1 is there twice: score table row 2 and score table row 3." in error_of(
        changed(2, sample_id=1)
    )


def test_a_proposal_without_a_policys_column_is_named_with_the_nearest() -> None:
    error = error_of(changed(4, proposal="helpp"))
    assert (
        f"{MEMORY} row 5: the proposal 'helpp' has no column 'log_ratio_helpp' in {MEMORY}; did you mean 'help'?"
        in error
    )
    assert "Proposals can be reference, help, harm" in error


@pytest.mark.parametrize("estimator", ["paper", "balanced"])
def test_prompts_with_one_response_are_counted_and_the_first_is_named(estimator: Any) -> None:
    """m = 1 makes F linear. The paper's estimator counts the rows of the reference only."""
    lone = [{**row, "prompt_id": name, "proposal": "help"} for name in ("r", "s") for row in GOOD[:1]]
    table = scores_from_table(pa.Table.from_pylist([*GOOD, *lone]))
    what, seen = ("responses drawn by the reference", 0) if estimator == "paper" else ("responses", 1)
    with pytest.raises(ScoreTableError) as caught:
        table.samples(estimator)
    assert str(caught.value).startswith(
        f"2 of 4 prompts have fewer than 2 {what}; the first is 'r' with {seen}. With one"
    )
    assert ("or use the balanced estimator" in str(caught.value)) == (estimator == "paper")


def test_an_objective_that_the_table_has_not_is_named() -> None:
    with pytest.raises(ScoreTableError, match="the score table has no objective 'short'; it has help, harm"):
        scores_from_table(pa.Table.from_pylist(GOOD)).samples("balanced", ["help", "short"])


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.parquet", b"PAR1 and nothing else", "a.parquet: not a sound Parquet file"),
        ("a.csv", b"", "a.csv: the file is empty; its first line must name the columns"),
        ("a.csv", b"prompt_id,prompt_id\n", "a.csv:1: the column 'prompt_id' is there twice"),
        ("a.csv", b"caf\xe9\n", "a.csv:1: not UTF-8"),
        ("a.csv", as_csv(GOOD) + b"p,7\n", "a.csv:8: wrong number of cells: 2, and the header has 6"),
        ("a.csv", as_csv(GOOD).replace(b"q,", b"\xe9,"), "a.csv:5: not UTF-8 at byte 1 of the line (0xe9)"),
        ("a.jsonl", as_jsonl(GOOD) + b'{"prompt_id": \n', "a.jsonl:7: malformed JSON"),
        ("a.jsonl", as_jsonl(GOOD) + b"[1]\n", "a.jsonl:7: not an object: a JSON list"),
        ("a.jsonl", as_jsonl(changed(3, prompt_id=4)), "a.jsonl:4: prompt_id is 4; all of a file's must be texts, or"),
        ("a.jsonl", as_jsonl(changed(3, proposal=4)), "a.jsonl:4: proposal is 4; it must be a text"),
        ("a.jsonl", as_jsonl(changed(3, reward_help=True)), "reward_help of prompt 'q', sample 0 is True"),
        ("a.csv.gz", gzip.compress(as_csv(GOOD))[:-20], "a.csv.gz: the gzip file ends too early"),
    ],
)
def test_a_damaged_file_is_refused_with_its_place(name: str, data: bytes, reason: str, tmp_path: Path) -> None:
    rows = data.replace(b'"reward_help"', b'"reward_harm": 0, "reward_help"') if b"true" in data else data
    assert reason in file_error(tmp_path / name, rows)


@pytest.mark.parametrize("num_more", [-1, 1])
def test_a_table_that_changes_while_it_is_read_is_refused(num_more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes must see the same rows, or values would land in the wrong place."""
    table = pa.Table.from_pylist([*GOOD, {**GOOD[0], "sample_id": 8}])

    class Growing(score_files.TableInMemory):
        def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
            yield from self.table[: 6 + (num_more if "log_ratio_help" in columns else 0)].select(columns).to_batches()

    monkeypatch.setattr(scores, "open_files", lambda _: [Growing(table, "growing.csv")])
    with pytest.raises(ScoreTableError, match=f"growing.csv: had 6 rows, and {6 + num_more} a moment later"):
        open_scores("growing.csv")
