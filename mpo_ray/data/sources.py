"""Where rows come from: files and hub data sets, as a stream of rows that each know their place.

Knows formats, compression and locations. Refuses to know what a row means: `comparisons`, `prompts` and `texts` do.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet

from mpo_ray.config_training import Source
from mpo_ray.records import digest
from mpo_ray.run import directory_digest, file_digest

#: Rows whose columns together decide the row form: a sparse column may be absent from the first row.
NUM_HEAD_ROWS = 1000


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


def read_rows(source: Source) -> Iterator[Row | Refusal]:
    """Stream the rows of a source, columns renamed; a malformed row comes as a Refusal in its place.

    Raises DataError for a file that is missing, empty, damaged or not UTF-8, and for a data set that does not load.
    """
    renamed: set[str] = set()
    seen: dict[str, None] = {}
    for row in _rows(source):
        if isinstance(row, Row) and source.rename:
            seen.update(dict.fromkeys(row.values))
            renamed.update(source.rename.keys() & row.values.keys())
            yield _rename(row, source.rename)
        else:
            yield row
    if unused := sorted(set(source.rename) - renamed):
        raise DataError(
            f"{describe(source)}: rename names the column {unused[0]!r}, which no row has; the columns are "
            f"{', '.join(seen) or 'none'}. Write rename as column in the file: name of the row form."
        )


def read_table(source: Source) -> tuple[list[str], Iterator[Row | Refusal]]:
    """The columns of a source, from its first rows, and all its rows as in `read_rows`.

    Raises DataError also if none of the first rows can be read.
    """
    rows = read_rows(source)
    head = list(itertools.islice(rows, NUM_HEAD_ROWS))
    columns = list(dict.fromkeys(column for row in head if isinstance(row, Row) for column in row.values))
    if not columns:
        first = next((row for row in head if isinstance(row, Refusal)), None)
        example = f"; {first.where}: {first.reason}" if first else ""
        raise DataError(f"{describe(source)}: none of the first {len(head)} rows can be read{example}.")
    return columns, itertools.chain(head, rows)


def fingerprint(source: Source) -> str:
    """Digest of what a source holds: it changes exactly when the rows may have changed.

    Files count by content and order, not by name. A hub data set counts by the fingerprint that `datasets` gives it.
    """
    if source.hub is None:
        contents: list[str] = [file_digest(file) for file in _files(source)]
    elif Path(source.hub).is_dir():
        contents = [directory_digest(source.hub), source.data_dir or "", source.split]
    else:
        contents = [str(_load_hub(source)._fingerprint)]
    return digest([contents, source.rename])


def describe(source: Source) -> str:
    """Name a source in a message, as the user wrote it."""
    if source.hub is not None:
        return "/".join(part for part in (source.hub, source.data_dir, source.split) if part)
    return ", ".join(source.path) if isinstance(source.path, list) else str(source.path)


def _rows(source: Source) -> Iterator[Row | Refusal]:
    if source.hub is not None:
        return _nonempty(_hub_rows(source), describe(source))
    return itertools.chain.from_iterable(_nonempty(_file_rows(file), file) for file in _files(source))


def _nonempty(rows: Iterator[Row | Refusal], name: str) -> Iterator[Row | Refusal]:
    first = next(rows, None)
    if first is None:
        raise DataError(f"{name}: holds no rows. Fill it, or take it out of the run file.")
    yield first
    yield from rows


def _rename(row: Row, names: dict[str, str]) -> Row:
    values: dict[str, Any] = {}
    for column, value in row.values.items():
        name = names.get(column, column)
        if name in values:
            raise DataError(f"{row.where}: after rename two columns have the name {name!r}. Rename the other one too.")
        values[name] = value
    return Row(row.where, values)


# ---- locations -------------------------------------------------------------------------------------------------


def _files(source: Source) -> list[str]:
    if source.path is None:
        raise ValueError(f"{source!r} has no path or hub: an embedded source is resolved to a path before it is read.")
    written = [source.path] if isinstance(source.path, str) else source.path
    return list_files(written, tuple(READERS))


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
        found = fs.ls(root, detail=False) if is_directory else fs.glob(root) if is_glob else []
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


def ending(path: str) -> str:
    """The ending that names a file's format: .csv for scores.csv and scores.csv.gz."""
    return Path(path.removesuffix(".gz")).suffix


@contextmanager
def opened(path: str) -> Iterator[Any]:
    """A file's bytes, decompressed; what goes wrong while they are read becomes a DataError that names the file."""
    try:
        fs, root = fsspec.core.url_to_fs(path)
        with fs.open(root, "rb") as raw, gzip.open(raw) if path.endswith(".gz") else nullcontext(raw) as file:
            yield file
    except EOFError:
        raise DataError(f"{path}: the gzip file ends too early. Copy or download it again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not a sound gzip file ({error}). Copy or download it again.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error


# ---- formats ---------------------------------------------------------------------------------------------------


def _file_rows(path: str) -> Iterator[Row | Refusal]:
    with opened(path) as file:
        yield from READERS[ending(path)](file, path)


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


def _read_csv(file: Iterable[bytes], name: str) -> Iterator[Row | Refusal]:
    """Rows by the header's names; a row is placed by the line it begins on."""
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is less than a long prompt
    reader = csv.reader(decoded_lines(file, name), strict=True)
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
    number = 0
    try:
        content = io.BytesIO(file.read()) if name.endswith(".gz") else file
        for batch in pyarrow.parquet.ParquetFile(content).iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{name} row {number}", values)
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


# ---- the hub ---------------------------------------------------------------------------------------------------


def _load_hub(source: Source) -> Any:
    import datasets  # slow to import, and only this form of source needs it

    try:
        return datasets.load_dataset(source.hub, data_dir=source.data_dir, split=source.split)
    except Exception as error:
        raise DataError(
            f"hub data set {source.hub!r} (split {source.split!r}, data_dir {source.data_dir!r}) does not load: "
            f"{type(error).__name__}: {error}. Check the id, the split and the network, or download the files and name "
            "them under `path:`."
        ) from error


def _hub_rows(source: Source) -> Iterator[Row | Refusal]:
    for number, values in enumerate(_load_hub(source), 1):
        yield Row(f"{describe(source)} row {number}", values)
