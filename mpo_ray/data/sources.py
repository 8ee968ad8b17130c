"""Where rows come from: files and hub data sets, as a stream of rows that each know their place.

Knows how a source is chosen and its columns are renamed. Refuses to know formats and locations (`files`), how a hub
data set is loaded (`hub`), and what a row means (`comparisons`, `prompts`, `texts`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from mpo_ray.config_training import Source
from mpo_ray.data.files import READERS, DataError, Refusal, Row, list_files, named, read_file
from mpo_ray.data.hub import HubFiles, HubTable, absolute_parts, load_hub, local_directory
from mpo_ray.records import digest
from mpo_ray.run import directory_digest, file_digest

__all__ = ["DataError", "Refusal", "Row", "describe", "fingerprint", "read_rows", "read_table"]

#: Rows whose columns together decide the row form: a sparse column may be absent from the first row.
NUM_HEAD_ROWS = 1000
#: Counts up where the same file is read as other values than before, so that a run reads it again.
RULES = 2


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

    Files count by content and order, not by name. A hub data set counts by the fingerprint that `datasets` gives it,
    or, where it is files of text, by their contents. The rules of reading count as well.
    """
    if source.hub is None:
        contents: list[Any] = [file_digest(file) for file in _files(source)]
    else:
        contents = [source.split, source.data_dir, source.config, source.revision]
        if (directory := local_directory(source)) is not None:
            contents.append(directory_digest(directory))
        else:
            found = load_hub(source)
            contents.append(found.digest if isinstance(found, HubTable) else _content_of(found))
    return digest([RULES, contents, source.rename])


def describe(source: Source) -> str:
    """Name a source in a message, as the user wrote it."""
    if source.hub is not None:
        name = source.hub if source.revision is None else f"{source.hub}@{source.revision}"
        return "/".join(part for part in (name, source.config, source.data_dir, source.split) if part)
    return ", ".join(source.path) if isinstance(source.path, list) else str(source.path)


def _content_of(found: HubFiles) -> list[Any]:
    files = {split: [file_digest(file.path) for file in files] for split, files in found.splits.items()}
    return [files, found.features, found.separator]


def _rows(source: Source) -> Iterator[Row | Refusal]:
    if source.hub is not None:
        return _nonempty(_hub_rows(source), describe(source))
    return itertools.chain.from_iterable(_nonempty(read_file(file), file) for file in _files(source))


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


def _files(source: Source) -> list[str]:
    if source.path is None:
        raise ValueError(f"{source!r} has no path or hub: an embedded source is resolved to a path before it is read.")
    written = [source.path] if isinstance(source.path, str) else source.path
    return list_files(written, tuple(READERS))


def _hub_rows(source: Source) -> Iterator[Row | Refusal]:
    """Texts exactly as written: files of text are read here, as under `path:`, other data sets by `datasets`."""
    found = load_hub(source)
    if isinstance(found, HubTable):
        for number, values in enumerate(found.rows, 1):
            yield named(Row(f"{describe(source)} row {number}", values), found.features)
    elif source.split in found.splits:
        yield from _hub_split(found, source.split)
    else:
        num_rows = {split: sum(1 for _ in _hub_split(found, split)) for split in found.splits}
        for split, first, end in absolute_parts(source, num_rows):
            yield from itertools.islice(_hub_split(found, split), first, end)


def _hub_split(found: HubFiles, split: str) -> Iterator[Row | Refusal]:
    for file in found.splits[split]:
        for row in read_file(file.path, name=file.name, separator=found.separator):
            yield named(row, found.features) if isinstance(row, Row) else row
