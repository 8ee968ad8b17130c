"""Rows come out of every format and place as they went in, and what cannot be read is named."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest

from mpo_ray.config_training import Source
from mpo_ray.data.sources import DataError, Refusal, Row, fingerprint, read_rows, read_table

ROWS = [
    {"prompt": "p1", "chosen": " yes,\u2028“indeed”\nand more", "rejected": "no"},
    {"prompt": "p2", "chosen": "a, b", "rejected": 'say "c"'},
]


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], object]] = {
    "rows.jsonl": lambda path, rows: path.write_bytes(as_jsonl(rows)),
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1), encoding="utf-8"),
    "lines.json": lambda path, rows: path.write_bytes(as_jsonl(rows)),
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
}


def values(source: Source) -> list[dict[str, Any]]:
    rows = list(read_rows(source))
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.values for row in rows if isinstance(row, Row)]


def error_of(source: Source) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(source))
    return str(caught.value)


@pytest.mark.parametrize("zipped", ["plain", "gz"])
@pytest.mark.parametrize("name", list(WRITERS))
def test_every_format_gives_back_the_rows_that_were_written(tmp_path: Path, name: str, zipped: str) -> None:
    path = tmp_path / name
    WRITERS[name](path, ROWS)
    if zipped == "gz":
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    assert values(Source(path=str(path))) == ROWS


def test_rows_are_placed_by_line_or_by_row(tmp_path: Path) -> None:
    """A CSV row is placed by the line it begins on, although its cells may go over several lines."""
    lines, table = tmp_path / "a.csv", tmp_path / "b.parquet"
    write_csv(lines, ROWS)
    write_parquet(table, ROWS)
    assert [row.where for row in read_rows(Source(path=str(lines)))] == [f"{lines}:2", f"{lines}:4"]
    assert [row.where for row in read_rows(Source(path=str(table)))] == [f"{table} row 1", f"{table} row 2"]


def test_blank_lines_count_for_places_and_not_as_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"x": 1}\n\n{"x": 2}\n', encoding="utf-8")
    assert list(read_rows(Source(path=str(path)))) == [Row(f"{path}:1", {"x": 1}), Row(f"{path}:3", {"x": 2})]


def test_lists_globs_directories_and_urls_name_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (2, 1):
        (tmp_path / f"part-{number}.jsonl").write_text(f'{{"x": {number}}}\n')
    (tmp_path / "README.md").write_text("no rows")
    (tmp_path / ".hidden.jsonl").write_text("no rows")
    one, two = str(tmp_path / "part-1.jsonl"), str(tmp_path / "part-2.jsonl")
    both = [{"x": 1}, {"x": 2}]
    assert values(Source(path=str(tmp_path / "part-*.jsonl"))) == both
    assert values(Source(path=str(tmp_path))) == both
    assert values(Source(path=[two, one])) == both[::-1]
    assert values(Source(path=[one, str(tmp_path)])) == both, "a file that is named twice is read once"
    assert values(Source(path=f"file://{one}")) == both[:1]
    memory = fsspec.filesystem("memory")
    memory.pipe("/mpo-test/rows.jsonl.gz", gzip.compress(as_jsonl(ROWS)))
    assert values(Source(path="memory://mpo-test/rows.jsonl.gz")) == ROWS
    assert values(Source(path="memory://mpo-test/*.jsonl.gz")) == ROWS
    monkeypatch.chdir(tmp_path)
    assert [row.where for row in read_rows(Source(path="part-*.jsonl"))] == ["part-1.jsonl:1", "part-2.jsonl:1"]


def test_rename_gives_columns_the_names_of_a_row_form(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"good": "g", "bad": "b"}\n')
    assert values(Source(path=str(path), rename={"good": "bad", "bad": "good"})) == [{"bad": "g", "good": "b"}]
    assert "rename names the column 'nope', which no row has; the columns are good, bad" in error_of(
        Source(path=str(path), rename={"nope": "x"})
    )
    assert f"{path}:1: after rename two columns have the name 'bad'" in error_of(
        Source(path=str(path), rename={"good": "bad"})
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/none.jsonl: no such file." in error_of(Source(path=f"{tmp_path}/none.jsonl"))
    assert f"{tmp_path}/*.csv: no file matches." in error_of(Source(path=f"{tmp_path}/*.csv"))
    assert "no file in this directory with a known ending (.jsonl, .json" in error_of(Source(path=str(tmp_path)))
    assert "nosuchprotocol://x/y.csv: cannot be reached" in error_of(Source(path="nosuchprotocol://x/y.csv"))
    assert "the list of files is empty" in error_of(Source(path=[]))


def test_an_unknown_kind_of_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("x\n")
    assert f"{path}: unknown kind of file. Known are .jsonl, .json, .csv, .parquet" in error_of(Source(path=str(path)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "header.csv", "a.jsonl.gz", "array.json", "a.parquet"])
def test_an_empty_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text({"header.csv": "prompt,chosen\n", "array.json": "[]"}.get(name, ""))
    if name == "a.parquet":
        pyarrow.parquet.write_table(pa.table({"x": pa.array([], pa.string())}), path)
    assert f"{path}: holds no rows." in error_of(Source(path=str(path)))


def test_a_truncated_gzip_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    packed = gzip.compress(as_jsonl([{"x": f"{number * 7919 % 10007}"} for number in range(5000)]))
    path.write_bytes(packed[: len(packed) // 2])
    assert f"{path}: the gzip file ends too early" in error_of(Source(path=str(path)))
    path.write_bytes(b"not zipped at all")
    assert f"{path}: not a sound gzip file" in error_of(Source(path=str(path)))
    path.write_bytes(packed[:200] + b"\x00\xff" * 50 + packed[300:])
    assert f"{path}: not a sound gzip file" in error_of(Source(path=str(path)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "lines.json"])
def test_bytes_that_are_not_utf8_are_placed_by_line_and_byte(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    start = b"[" if name == "a.json" else b"{}" if name != "a.csv" else b"x"
    path.write_bytes(start + b"\nab\xe9\n")
    assert f"{path}:2: not UTF-8 at byte 3 of the line (0xe9)" in error_of(Source(path=str(path)))


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    assert f"{path}: not a sound Parquet file" in error_of(Source(path=str(path)))


def test_a_malformed_json_line_is_refused_in_its_place_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": 1}\n{"x": \n[1]\n{"x": 2}\n')
    first, second, third, last = read_rows(Source(path=str(path)))
    assert (first, last) == (Row(f"{path}:1", {"x": 1}), Row(f"{path}:4", {"x": 2}))
    assert isinstance(second, Refusal)
    assert second.where == f"{path}:2"
    assert second.reason.startswith("malformed JSON: ")
    assert third == Refusal(f"{path}:3", "not an object: a JSON list")


def test_a_malformed_json_array_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"x": 1}, ')
    assert f"{path}: malformed JSON" in error_of(Source(path=str(path)))


def test_csv_that_is_not_sound_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('x,y\n1,2\n1,2,3\n"1,2\n')
    rows = read_rows(Source(path=str(path)))
    assert next(rows) == Row(f"{path}:2", {"x": "1", "y": "2"})
    assert next(rows) == Refusal(f"{path}:3", "wrong number of cells: 3, and the header has 2")
    with pytest.raises(DataError, match=r"a\.csv:4: not sound CSV"):
        next(rows)
    path.write_text("x,x\n1,2\n")
    assert f"{path}:1: the column 'x' is there twice" in error_of(Source(path=str(path)))


def test_a_csv_cell_may_be_longer_than_the_csv_module_allows_by_default(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_csv(path, [{"x": "long " * 100_000}])
    assert values(Source(path=str(path))) == [{"x": "long " * 100_000}]


def test_a_table_without_a_readable_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("no json\n" * 3)
    with pytest.raises(DataError, match=r"none of the first 3 rows can be read; .*a\.jsonl:1: malformed JSON"):
        read_table(Source(path=str(path)))


def test_columns_are_those_of_any_of_the_first_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": 1}\n{"y": 2}\n')
    columns, rows = read_table(Source(path=str(path)))
    assert columns == ["x", "y"]
    assert len(list(rows)) == 2


def test_an_embedded_source_must_have_been_resolved() -> None:
    with pytest.raises(ValueError, match="resolved to a path"):
        list(read_rows(Source(embedded="pairs")))


def test_the_fingerprint_follows_content_and_rename_and_not_the_name(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("one.jsonl", "same.jsonl", "other.jsonl"))
    for path, content in ((one, '{"x": 1}\n'), (same, '{"x": 1}\n'), (other, '{"x": 2}\n')):
        path.write_text(content)
    assert fingerprint(Source(path=str(one))) == fingerprint(Source(path=str(same)))
    different = [
        Source(path=str(one)),
        Source(path=str(other)),
        Source(path=[str(one), str(other)]),
        Source(path=[str(other), str(one)]),
        Source(path=str(one), rename={"x": "y"}),
    ]
    assert len({fingerprint(source) for source in different}) == len(different)


def test_errors_survive_pickling() -> None:
    assert str(pickle.loads(pickle.dumps(DataError("what, where, what to do")))) == "what, where, what to do"


@pytest.mark.parametrize("name", ["a[1].jsonl", "b?.jsonl", "c*.jsonl", "d{1,2}.jsonl", "e[!x]/f.jsonl", "~g.jsonl"])
def test_a_file_that_is_there_is_that_file_whatever_signs_its_name_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As a pattern, `a[1].jsonl` means a1.jsonl, which is there as well."""
    for number, file in enumerate([name, name.translate({ord(sign): None for sign in "[]?*{}!~"})]):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(f'{{"x": {number}}}\n')
    assert values(Source(path=str(tmp_path / name))) == [{"x": 0}]
    monkeypatch.chdir(tmp_path)
    if not name.startswith("~"):
        assert values(Source(path=name)) == [{"x": 0}]


def test_a_glob_may_stand_below_a_directory_whose_name_has_its_signs(tmp_path: Path) -> None:
    for directory in ("runs[1]", "runs1"):
        (tmp_path / directory / "sub").mkdir(parents=True)
        (tmp_path / directory / "sub" / "a.jsonl").write_text(f'{{"x": "{directory}"}}\n')
    for pattern in ("runs[1]/*/*.jsonl", "runs[1]/sub/*.jsonl", "runs[1]/sub", "runs[1]/**/*.jsonl"):
        assert values(Source(path=str(tmp_path / pattern))) == [{"x": "runs[1]"}], pattern


def test_a_tilde_stands_for_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    for path in ("~/a.jsonl", "~/*.jsonl", "~"):
        assert values(Source(path=path)) == [{"x": 1}]
        assert fingerprint(Source(path=path)) == fingerprint(Source(path=str(tmp_path / "a.jsonl")))
