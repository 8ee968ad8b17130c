"""What is at a place: files of this machine, or of an fsspec URL such as s3://bucket/path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper

from mpo_ray.whole_files import PARTIAL


@dataclass(frozen=True, slots=True)
class FileState:
    """What a listing says of a file: its size in bytes, and a mark that is another once it was written again."""

    size: int
    stamp: str


def open_filesystem(root: str) -> tuple[Any, str]:
    """The file system of a URL, by its fsspec package, or by pyarrow where that is not installed."""
    try:
        # Other processes write here too: a cached listing would hide what they have finished.
        filesystem, base = fsspec.core.url_to_fs(root, use_listings_cache=False)
    except ImportError:
        if not root.startswith(("s3://", "gs://")):
            raise
        arrow, base = pyarrow.fs.FileSystem.from_uri(root)
        filesystem = ArrowFSWrapper(arrow, use_listings_cache=False)
    return filesystem, base.rstrip("/")


def walk(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
    for directory, names, files in os.walk(place, followlinks=True):
        names[:] = [name for name in names if not name.startswith(PARTIAL)]
        yield from (Path(directory) / name for name in files if not name.startswith(PARTIAL))


def state_of(path: Path) -> FileState:
    found = path.stat()
    return FileState(found.st_size, str(found.st_mtime_ns))


def stamp_of(info: dict[str, Any]) -> str:
    """The content's hash or, where a listing has none, the time of its writing."""
    names = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime", "created")
    return next((str(info[name]) for name in names if info.get(name) is not None), "")
