"""Score tables where they lie: Parquet, CSV and JSON Lines files, and tables in memory, as streams of columns.

Knows formats and the types of the columns. Refuses to know what the columns mean together: `scores` does.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mpo_ray.config_training import Source
from mpo_ray.data.files import DataError, Row, decoded_lines, ending, list_files, opened
from mpo_ray.data.sources import NUM_HEAD_ROWS, read_rows

ENDINGS = (".parquet", ".csv", ".jsonl")
#: Rows that are worked on together; bytes of text that Arrow parses together, more than the longest row.
BATCH_ROWS = 1 << 16
BLOCK_BYTES = 1 << 24
READ_BYTES = 1 << 20

PROMPT, SAMPLE, PROPOSAL = "prompt_id", "sample_id", "proposal"


class ScoreTableError(DataError):
    """A score table cannot be used. The message says what is wrong, where, the value seen, and what to do."""


class ScoreFile(Protocol):
    """One file, or one table in memory, of which columns can be read one batch of rows after the other."""

    @property
    def name(self) -> str: ...

    @property
    def columns(self) -> tuple[str, ...]: ...

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows in order, `columns` only, at most about BATCH_ROWS or BLOCK_BYTES together."""
        ...


def open_files(paths: str | Sequence[str]) -> list[ScoreFile]:
    """The files that paths, globs, directories and URLs stand for; nothing but their columns is read yet.

    Raises ScoreTableError for a file that is missing, empty or of an unknown kind.
    """
    with _refused():
        files = list_files([paths] if isinstance(paths, str) else paths, ENDINGS)
    return [_KINDS[ending(file)](file) for file in files]


def check_columns(file: ScoreFile, columns: Sequence[str]) -> None:
    """Raise ScoreTableError for the first of `columns` that the file has not, naming the nearest that it has."""
    for column in columns:
        if column not in file.columns:
            near = difflib.get_close_matches(column, file.columns, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ScoreTableError(
                f"{file.name}: no column {column!r}; {hint}Its columns are {', '.join(file.columns) or 'none'}."
            )


def numbers(column: pa.Array, name: str, file: str) -> NDArray[np.float64]:
    """A column as float64; NaN where it is empty. Raises ScoreTableError for one that holds no numbers."""
    kind = column.type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)):
        raise ScoreTableError(f"{file}: the column {name!r} has the type {kind}; it must hold numbers.")
    return np.asarray(pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False))


def refuse_value(where: str, column: str, value: object, *, prompt: object, sample: object) -> ScoreTableError:
    """The error for a cell that is empty, no number, or not finite."""
    seen = "empty" if value is None or value == "" else str(value) if isinstance(value, float) else repr(value)
    kind = "a whole number" if column == SAMPLE else "a finite number"
    return ScoreTableError(
        f"{where}: {column} of prompt {prompt!r}, sample {sample} is {seen}; it must be {kind}. Compute it again or "
        "leave the row out."
    )


@dataclass(frozen=True)
class TableInMemory:
    """A table that is already there, such as the score table of a run."""

    table: pa.Table
    name: str

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.table.column_names)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        yield from self.table.select(list(columns)).to_batches(max_chunksize=BATCH_ROWS)


@dataclass(frozen=True)
class _ParquetFile:
    name: str

    def __post_init__(self) -> None:
        if self.name.endswith(".gz"):
            raise ScoreTableError(f"{self.name}: a Parquet file is compressed within; unpack it with gunzip.")

    @cached_property
    def columns(self) -> tuple[str, ...]:
        with self._opened() as file:
            return tuple(file.schema_arrow.names)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with self._opened() as file:
            yield from file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns))

    @contextmanager
    def _opened(self) -> Iterator[pq.ParquetFile]:
        try:
            with _refused(), opened(self.name) as raw:
                # Pages are read as they are needed: a file may be a single row group.
                yield pq.ParquetFile(raw, pre_buffer=False, buffer_size=READ_BYTES)
        except pa.ArrowException as error:
            raise ScoreTableError(f"{self.name}: not a sound Parquet file: {error}. Copy or write it again.") from None


@dataclass(frozen=True)
class _CsvFile:
    name: str

    @cached_property
    def columns(self) -> tuple[str, ...]:
        with _refused(), opened(self.name) as file:
            header = next(csv.reader(decoded_lines(file, self.name)), [])
        if not header:
            raise ScoreTableError(f"{self.name}: the file is empty; its first line must name the columns.")
        if len(set(header)) < len(header):
            twice = next(column for column in header if header.count(column) > 1)
            raise ScoreTableError(f"{self.name}:1: the column {twice!r} is there twice. Give each column its own name.")
        return tuple(header)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with _text_errors(self.name, columns), _refused(), opened(self.name) as file:
            yield from pyarrow.csv.open_csv(
                file,
                read_options=pyarrow.csv.ReadOptions(block_size=BLOCK_BYTES),
                parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
                convert_options=pyarrow.csv.ConvertOptions(
                    include_columns=list(columns),
                    column_types={column: _type(column) for column in columns},
                    null_values=[""],
                    strings_can_be_null=True,
                ),
            )


@dataclass(frozen=True)
class _JsonLinesFile:
    name: str

    @cached_property
    def _head(self) -> list[dict[str, Any]]:
        """The first rows: their keys together are the columns, as a key may be absent from one row."""
        with _refused():
            rows = itertools.islice(read_rows(Source(path=self.name)), NUM_HEAD_ROWS)
            return [row.values for row in rows if isinstance(row, Row)]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key for row in self._head for key in row))

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        integer_ids = isinstance(self._head[0].get(PROMPT), int) if self._head else False
        types = {column: pa.int64() if column == PROMPT and integer_ids else _type(column) for column in columns}
        with _text_errors(self.name, columns), _refused(), opened(self.name) as file:
            blocks = pyarrow.json.open_json(
                file,
                read_options=pyarrow.json.ReadOptions(block_size=BLOCK_BYTES),
                parse_options=pyarrow.json.ParseOptions(
                    explicit_schema=pa.schema(list(types.items())), unexpected_field_behavior="ignore"
                ),
            )
            yield from (block.select(list(columns)) for block in blocks)


_KINDS: dict[str, Any] = {".parquet": _ParquetFile, ".csv": _CsvFile, ".jsonl": _JsonLinesFile}


def _type(column: str) -> pa.DataType:
    """The type that a column of text is parsed as."""
    return {PROMPT: pa.string(), PROPOSAL: pa.string(), SAMPLE: pa.int64()}.get(column, pa.float64())


@contextmanager
def _refused() -> Iterator[None]:
    """What `sources` refuses is a score table that cannot be used."""
    try:
        yield
    except ScoreTableError:
        raise
    except DataError as error:
        raise ScoreTableError(str(error)) from None


@contextmanager
def _text_errors(name: str, columns: Sequence[str]) -> Iterator[None]:
    """Say in which row it is that Arrow could not parse: read again, row by row, up to the first bad one."""
    try:
        yield
    except pa.ArrowInvalid as error:
        with _refused():
            _find_bad_row(name, columns)
        raise ScoreTableError(f"{name}: cannot be read: {error}. Look for that text and mend its row.") from None


def _find_bad_row(name: str, columns: Sequence[str]) -> None:
    kinds: set[type] = set()
    for row in read_rows(Source(path=name)):
        if not isinstance(row, Row):
            raise ScoreTableError(f"{row.where}: {row.reason}. Mend the row or leave it out.")
        prompt, sample = row.values.get(PROMPT), row.values.get(SAMPLE)
        kinds.add(type(prompt))
        if kinds - {int, str} or len(kinds) > 1:
            raise ScoreTableError(
                f"{row.where}: prompt_id is {json.dumps(prompt)}; all of a file's must be texts, or all whole numbers."
            )
        for column in columns:
            value = row.values.get(column)
            if column == PROPOSAL and value is not None and not isinstance(value, str):
                raise ScoreTableError(f"{row.where}: proposal is {json.dumps(value)}; it must be a text.")
            if column not in (PROMPT, PROPOSAL) and not _is_number(value, whole=column == SAMPLE, name=name):
                raise refuse_value(row.where, column, value, prompt=prompt, sample=sample)


def _is_number(value: Any, *, whole: bool, name: str) -> bool:
    if ending(name) != ".csv":
        return isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    try:
        int(value) if whole else float(value)
    except ValueError:
        return False
    return True
