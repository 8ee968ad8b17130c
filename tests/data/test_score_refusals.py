"""What is no score table is refused, with the place, the value and what to do."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpo_ray.data import score_files, scores
from mpo_ray.data.score_files import ScoreTableError
from mpo_ray.data.scores import open_scores, scores_from_table
from tests.data.score_tables import Rows, as_csv, as_jsonl, write

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
        ("a.csv.gz", gzip.compress(as_csv(GOOD), mtime=0)[:-20], "a.csv.gz: the gzip file ends too early"),
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
