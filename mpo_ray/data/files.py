"""Files of rows: locations, compression and formats, as a stream of rows that each know their place.

Refuses to know hub data sets (`hub`) and what a row means.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet

from mpo_ray.data.schema import UnknownClassError, parquet_features, with_class_names


class DataError(ValueError):
    """Data cannot be used as asked. The message says what is wrong, where, and what to do."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `where` is its place: `pairs.jsonl:17` in files of lines, `pairs.parquet row 17` elsewhere, from 1."""

    where: str
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that cannot be used. `reason` is its kind, then, where there is more to say, a colon and the details."""

    where: str
    reason: str


def named(row: Row, features: Mapping[str, Any]) -> Row | Refusal:
    """A row with the names that the schema gives to classes."""
    try:
        return Row(row.where, with_class_names(row.values, features))
    except UnknownClassError as error:
        return Refusal(row.where, str(error))


# ---- locations -------------------------------------------------------------------------------------------------


def list_files(paths: Sequence[str], endings: Sequence[str]) -> list[str]:
    """The files that paths, directories, globs and URLs stand for, each once; globs and directories sorted by name.

    Of a directory only the files with one of `endings`, perhaps followed by .gz, count. Raises DataError for what is
    not there, cannot be reached, or has another ending.
    """
    files = list(dict.fromkeys(file for path in paths for file in _expand(path, endings)))
    if not files:
        raise DataError("path: the list of files is empty. Name at least one file, glob, directory or URL.")
    for file in files:
        if ending(file) not in endings:
            raise DataError(f"{file}: unknown kind of file. Known are {', '.join(endings)}, each also with .gz.")
    return files


def _expand(path: str, endings: Sequence[str]) -> list[str]:
    try:
        fs, root = fsspec.core.url_to_fs(path)
        if fs.isfile(root):
            return [path]
        is_directory, is_glob = fs.isdir(root), any(sign in root for sign in "*?[")
        found = fs.ls(root, detail=False) if is_directory else fs.glob(_pattern(fs, root)) if is_glob else []
    except Exception as error:
        raise DataError(
            f"{path}: cannot be reached: {type(error).__name__}: {error}. Check the address, the credentials, and that "
            "the fsspec package for its protocol is installed."
        ) from error
    if is_directory:
        found = [file for file in found if ending(file) in endings and not os.path.basename(file).startswith(".")]
    if not found:
        what = "no file in this directory" if is_directory else "no file matches" if is_glob else "no such file"
        kinds = f" with a known ending ({', '.join(endings)}, each also with .gz)" if is_directory else ""
        raise DataError(f"{path}: {what}{kinds}. Paths are relative to the working directory, {os.getcwd()}.")
    is_local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
    if not is_local:
        return sorted(fs.unstrip_protocol(file) for file in found)
    return sorted(file if os.path.isabs(path) or "://" in path else os.path.relpath(file) for file in found)


def _pattern(fs: Any, root: str) -> str:
    """A glob whose leading directories count by their names where they are there, whatever signs are in them."""
    parts = root.split("/")
    for number in range(len(parts) - 1, 0, -1):
        before = "/".join(parts[:number])
        if before and any(sign in before for sign in "*?[") and fs.isdir(before):
            return "/".join([glob.escape(before), *parts[number:]])
    return root


def ending(path: str) -> str:
    """The ending that names a file's format: .csv for scores.csv and scores.csv.gz."""
    return Path(path.removesuffix(".gz")).suffix


@contextmanager
def opened(path: str, *, name: str | None = None) -> Iterator[Any]:
    """A file's bytes, decompressed; what goes wrong while they are read becomes a DataError that names the file.

    `name` is what a copy is called, its ending included; by default the path.
    """
    name = path if name is None else name
    try:
        fs, root = fsspec.core.url_to_fs(path)
        with fs.open(root, "rb") as raw, gzip.open(raw) if name.endswith(".gz") else nullcontext(raw) as file:
            yield file
    except EOFError:
        raise DataError(f"{name}: the gzip file ends too early. Copy or download it again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name}: not a sound gzip file ({error}). Copy or download it again.") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error}.") from error


# ---- formats ---------------------------------------------------------------------------------------------------


def read_file(path: str, *, name: str | None = None, separator: str = ",") -> Iterator[Row | Refusal]:
    """The rows of a file. `name` is what a copy is called, its ending included; by default the path."""
    name = path if name is None else name
    kind = ending(name)
    with opened(path, name=name) as file:
        if kind in (".csv", ".tsv"):
            yield from _read_csv(file, name, separator=separator)
        else:
            yield from READERS.get(kind, _read_json_lines)(file, name)


def _decode(data: bytes, name: str, line: int = 1) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        byte = error.start - data.rfind(b"\n", 0, error.start)
        raise DataError(
            f"{name}:{line}: not UTF-8 at byte {byte} of the line (0x{data[error.start]:02x}). Save the file as UTF-8."
        ) from None


def decoded_lines(file: Iterable[bytes], name: str) -> Iterator[str]:
    """Decoded lines; only a line feed ends one, as JSON strings may hold every other separator."""
    for number, line in enumerate(file, 1):
        yield _decode(line, name, number)


def _read_json_lines(file: Iterable[bytes], name: str) -> Iterator[Row | Refusal]:
    for number, line in enumerate(decoded_lines(file, name), 1):
        where = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Refusal(where, f"malformed JSON: {error}")
        else:
            yield _object(where, value)


def _read_json(file: BinaryIO, name: str) -> Iterator[Row | Refusal]:
    """An array of objects; a file that is no array is read as one object per line, which often has this ending too."""
    data = file.read()
    text = _decode(data, name)
    if not text.lstrip().startswith("["):
        yield from _read_json_lines(io.BytesIO(data), name)
        return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: malformed JSON: {error}. A .json file is an array of objects.") from None
    for number, value in enumerate(values, 1):
        yield _object(f"{name} row {number}", value)


def _object(where: str, value: object) -> Row | Refusal:
    if isinstance(value, dict):
        return Row(where, value)
    return Refusal(where, f"not an object: a JSON {type(value).__name__}")


def _read_csv(file: Iterable[bytes], name: str, *, separator: str = ",") -> Iterator[Row | Refusal]:
    """Rows by the header's names; a row is placed by the line it begins on."""
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is less than a long prompt
    reader = csv.reader(decoded_lines(file, name), delimiter=separator, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            twice = next(column for column in header if header.count(column) > 1)
            raise DataError(f"{name}:1: the column {twice!r} is there twice. Give each column its own name.")
        begin = reader.line_num + 1
        for cells in reader:
            where, begin = f"{name}:{begin}", reader.line_num + 1
            if len(cells) == len(header):
                yield Row(where, dict(zip(header, cells, strict=True)))
            elif cells:
                yield Refusal(where, f"wrong number of cells: {len(cells)}, and the header has {len(header)}")
    except csv.Error as error:
        raise DataError(
            f"{name}:{reader.line_num}: not sound CSV: {error}. Check the quotes from here upwards."
        ) from None


def _read_parquet(file: BinaryIO, name: str) -> Iterator[Row | Refusal]:
    """The rows of a table, classes by the names that its metadata declares."""
    number = 0
    try:
        content = io.BytesIO(file.read()) if name.endswith(".gz") else file
        table = pyarrow.parquet.ParquetFile(content)
        try:
            features = parquet_features(table.schema_arrow.metadata)
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(f"{name}: the metadata `huggingface` is not sound: {error!r}. Write it again.") from None
        for batch in table.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield named(Row(f"{name} row {number}", values), features)
    except pa.ArrowException as error:
        raise DataError(f"{name}: not a sound Parquet file: {error}. Copy or write it again.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 in or after row {number + 1}: {error}. Write the texts as UTF-8.") from None


READERS: dict[str, Callable[[Any, str], Iterator[Row | Refusal]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
