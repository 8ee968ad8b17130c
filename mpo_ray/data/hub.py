"""Hub data sets: which files of text one consists of, or its rows as `datasets` reads them.

CSV and JSON files are handed on as files, because `datasets` changes their texts: `NA` becomes None, `007` a number, a
date a datetime. Refuses to know what a file or a row holds.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo_ray.config_training import Source
from mpo_ray.data.files import DataError
from mpo_ray.records import digest

#: Endings of the files of text that are handed on as files, each perhaps followed by .gz.
TEXT_ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
#: What `save_to_disk` of `datasets` leaves: of one split, and of several.
SAVED = ("state.json", "dataset_dict.json")
#: How `datasets` reads the other files of text with the least change to their texts.
OPTIONS: Mapping[str, dict[str, Any]] = {
    "csv": {"keep_default_na": False, "na_values": []},
    "json": {"parse_agent_traces": False},
}
#: Options of `datasets` for its own work, which say nothing about how a file is to be read.
_OF_THE_BUILDER = ("name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a hub data set: where it lies on this machine, and its name in the data set, which has its ending."""

    path: str
    name: str


@dataclass(frozen=True, slots=True)
class HubFiles:
    """A hub data set that is files of text, by split. `features`: what its card declares, as `datasets` writes it."""

    splits: dict[str, list[HubFile]]
    features: dict[str, Any]
    separator: str


@dataclass(frozen=True, slots=True)
class HubTable:
    """A split of any other hub data set: its rows (an iterable of dicts) and its features."""

    rows: Any
    features: dict[str, Any]
    digest: str


def load_hub(source: Source) -> HubFiles | HubTable:
    """Find a hub data set, or a local directory in the hub's layout, and fetch its files. Raises DataError.

    A local directory may also be what `save_to_disk` of `datasets` wrote.
    """
    try:
        return _load(source)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{_name(source)} does not load: {_cause(error)}. {_remedy(error)}") from error


def absolute_parts(source: Source, num_rows: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """The parts (split, first row, row after the last) of a split such as `train[:10%]+test`. Raises DataError."""
    import datasets

    try:
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute(dict(num_rows))
    except (ValueError, AssertionError) as error:
        raise DataError(f"{_name(source)} does not load: {error} Check the split.") from error
    return [
        (part.splitname, part.from_ or 0, num_rows[part.splitname] if part.to is None else part.to) for part in parts
    ]


def _name(source: Source) -> str:
    """A hub data set with everything that chooses it, as a message names it."""
    chosen = [
        f"{name} {value!r}"
        for name in ("config", "split", "data_dir", "revision")
        if (value := getattr(source, name)) is not None
    ]
    return f"hub data set {source.hub!r} ({', '.join(chosen)})"


def local_directory(source: Source) -> Path | None:
    """The directory that a source's `hub` names, None where it is an id."""
    assert source.hub is not None
    path = Path(source.hub).expanduser()
    return path if path.is_dir() else None


def _load(source: Source) -> HubFiles | HubTable:
    import datasets  # slow to import, and only this form of source needs it

    directory = local_directory(source)
    if directory is not None and any((directory / name).exists() for name in SAVED):
        return _load_saved(source, directory)
    place = {
        "path": source.hub if directory is None else str(directory),
        "name": source.config,
        "data_dir": source.data_dir,
        "revision": source.revision,
    }
    builder = datasets.load_dataset_builder(**place)
    features = builder.info.features
    declared = {} if features is None else features.to_dict()
    written = builder.config.data_files or {}
    if builder.name in OPTIONS and _is_plain(builder.config) and _are_texts(written):
        manager = datasets.DownloadManager(dataset_name=builder.dataset_name)
        splits = {
            str(split): [
                HubFile(path, _file_name(original, source.hub, directory))
                for path, original in zip(manager.download(list(files)), files, strict=True)
            ]
            for split, files in written.items()
        }
        return HubFiles(splits, declared, getattr(builder.config, "sep", ","))
    rows: Any = datasets.load_dataset(**place, split=source.split, **OPTIONS.get(builder.name, {}))
    return HubTable(rows, rows.features.to_dict(), digest([str(rows._fingerprint), source.config, source.revision]))


def _load_saved(source: Source, directory: Path) -> HubTable:
    """A data set as `save_to_disk` wrote it."""
    import datasets

    found: Any = datasets.load_from_disk(directory)
    splits = found if isinstance(found, dict) else {str(found.split or "train"): found}
    parts = absolute_parts(source, {name: len(rows) for name, rows in splits.items()})
    rows: Any = datasets.concatenate_datasets([splits[name].select(range(start, stop)) for name, start, stop in parts])
    return HubTable(rows, rows.features.to_dict(), digest([str(rows._fingerprint), source.split]))


def _is_plain(config: Any) -> bool:
    """Whether the data set's card sets no option of reading that our own readers do not know."""
    options = {field.name for field in dataclasses.fields(config)} - set(_OF_THE_BUILDER)
    default = type(config)()
    return all(getattr(config, name) == getattr(default, name) for name in options)


def _are_texts(written: Mapping[Any, Sequence[str]]) -> bool:
    files = [file for files in written.values() for file in files]
    return bool(files) and all(file.removesuffix(".gz").endswith(TEXT_ENDINGS) for file in files)


def _file_name(file: str, hub: str | None, directory: Path | None) -> str:
    """A file as a message names it: below a local directory as the user wrote that, else by its address."""
    return file if directory is None or "://" in file else f"{hub}/{os.path.relpath(file, directory.resolve())}"


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what it came from, the first cause last."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    return chain


def _cause(error: BaseException) -> str:
    """What went wrong, and, where `datasets` says only that something did, what it was in the first place."""
    told = [f"{type(found).__name__}: {str(found).strip().rstrip('.')}" for found in _causes(error)]
    return told[0] if len(told) == 1 or told[0] == told[-1] else f"{told[0]} (from {told[-1]})"


def _remedy(error: BaseException) -> str:
    """What to do, by the kind of the cause."""
    kinds = {kind.__name__ for found in _causes(error) for kind in type(found).__mro__}
    if "ImportError" in kinds:
        return "Install the missing package, or write the data as Parquet or JSON lines and name the files in `path:`."
    if kinds & {"ConnectionError", "OfflineModeIsEnabled", "TimeoutError", "ConnectError", "HTTPError"}:
        return "Check the network, or download the files and name them in `path:`."
    if kinds & {"DatasetNotFoundError", "FileNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError"}:
        return (
            "Check the id, the data_dir, the revision and, for a data set that is gated, your login, or download the "
            "files and name them in `path:`."
        )
    return "Check the config and the split, or download the files and name them in `path:`."
