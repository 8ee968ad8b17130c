"""A directory of files that are written whole: on this machine, or at an fsspec URL such as s3://bucket/path.

A node is a path below the directory. On a file system, files and directories are put in place by a rename; on object
storage a file is one upload, and a directory is uploaded with the file that vouches for it last.
"""

from __future__ import annotations

import getpass
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from mpo_ray.file_listing import FileState, open_filesystem, stamp_of, state_of, walk
from mpo_ray.records import digest
from mpo_ray.whole_files import PARTIAL, create_file, move_file, sweep, write_file, written_directory

#: Where a Parquet file, or a column of one, says what it was made from: a key of its Arrow metadata.
INPUTS = b"mpo_ray.inputs"
#: Files that are sent or fetched at once.
TRANSFERS = 16


class RunError(ValueError):
    """The run directory cannot be used as asked: another config began it, an output is missing, or it is read-only."""


class Storage:
    """`root` is an absolute local path or an fsspec URL; `local` is a directory on this machine."""

    def __init__(self, storage: str, name: str) -> None:
        self.is_local = "://" not in storage or storage.startswith("file://")
        if self.is_local:
            self.root = str(Path(storage.removeprefix("file://")).absolute() / name)
            self.local = Path(self.root)
        else:
            self.root = f"{storage.rstrip('/')}/{name}"
            own = Path(tempfile.gettempdir()) / f"mpo_ray-{getpass.getuser()}"  # users do not share their copies
            self.local = own / hashlib.sha256(self.root.encode()).hexdigest()[:16]
        self.name = name
        try:
            self.filesystem, self._base = open_filesystem(self.root)
        except (ImportError, ValueError, OSError) as error:
            raise RunError(
                f"storage {self.root} cannot be used: {error}. Set `storage:` to a directory, or to a URL whose fsspec "
                "package is installed (adlfs for abfs://; s3:// and gs:// need none, and use s3fs or gcsfs if present)."
            ) from error

    def path(self, node: str) -> str:
        """A node as `filesystem` names it."""
        return f"{self._base}/{node}" if node else self._base

    def check_writable(self) -> None:
        """Write, read and delete a small file in storage. Raises RunError with the cause."""
        probe = f"{PARTIAL}probe-{os.urandom(8).hex()}"  # `sweep` knows it by its name, if this process is killed now
        try:
            self.write_text(probe, "mpo_ray")
            if self.read_text(probe) != "mpo_ray":
                raise OSError("what was written could not be read back")
            self.filesystem.rm_file(self.path(probe))
        except Exception as error:
            raise RunError(
                f"storage {self.root} cannot be written: {error}. Set `storage:` to a directory or URL that you may "
                "write to."
            ) from error

    # ---- files -------------------------------------------------------------------------------------------------

    def exists(self, node: str) -> bool:
        """Whether there is a file or, below a directory of this name, some file."""
        if self.is_local:
            return (self.local / node).exists()
        return bool(self.filesystem.isfile(self.path(node))) or bool(self.files(node))

    def files(self, node: str) -> dict[str, FileState]:
        """Every file below a directory by its node, or the file alone; none where nothing is there."""
        if self.is_local:
            return {str(path.relative_to(self.local)): state_of(path) for path in walk(self.local / node)}
        found = self.filesystem.find(self.path(node), detail=True)
        base = self._base.strip("/")
        return {
            path.strip("/").removeprefix(base).lstrip("/"): FileState(int(info["size"]), stamp_of(info))
            for path, info in found.items()
            if info["type"] == "file" and not os.path.basename(path).startswith(PARTIAL)
        }

    def read_bytes(self, node: str) -> bytes | None:
        """Content of a file, None if there is none."""
        try:
            return bytes(self.filesystem.cat_file(self.path(node)))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_text(self, node: str) -> str | None:
        """Content of a text file, None if there is none. Raises RunError where it is no UTF-8."""
        content = self.read_bytes(node)
        try:
            return None if content is None else content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(node, error) from error

    def write_text(self, node: str, text: str) -> None:
        self.write_bytes(node, text.encode("utf-8"))

    def write_bytes(self, node: str, content: bytes) -> None:
        """Write a file whole: a reader sees the old content or the new, never a part."""
        if self.is_local:
            write_file(self.local / node, content)
        else:
            self._make_parent(node)
            self.filesystem.pipe_file(self.path(node), content)

    def put_file(self, node: str, path: Path) -> None:
        """Move a file from below `local` into the run, whole."""
        if self.is_local:
            move_file(path, self.local / node)
        else:
            self._make_parent(node)
            self.filesystem.put_file(str(path), self.path(node))

    def create(self, node: str, content: bytes) -> bool:
        """Write a file that must not be there; False where it is.

        Of several processes exactly one gets True on a file system, and on object storage whose fsspec package has a
        conditional upload (s3fs has). Elsewhere two that begin within the same moment may both get True.
        """
        if self.is_local:
            return create_file(self.local / node, content)
        self._make_parent(node)
        try:
            self.filesystem.pipe_file(self.path(node), content, mode="create")
        except FileExistsError:
            return False
        return True

    def read_json(self, node: str) -> Any:
        """A file's value, None if there is none. Raises RunError where it is no JSON."""
        text = self.read_text(node)
        try:
            return None if text is None else json.loads(text)
        except ValueError as error:
            raise self._damaged(node, error) from error

    def write_json(self, node: str, value: Any) -> None:
        self.write_text(node, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_config(self) -> dict[str, Any] | None:
        """What config.yaml holds, None if there is none. Raises RunError where it is no mapping."""
        text = self.read_text("config.yaml")
        if text is None:
            return None
        remedy = "Write it again from your run file, or take another `name:`"
        try:
            config = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RunError(f"{self.root}/config.yaml cannot be read: {error}. {remedy}.") from error
        if not isinstance(config, dict):
            raise RunError(f"{self.root}/config.yaml cannot be read: it holds no keys. {remedy}.")
        return config

    def read_table(self, node: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a Parquet file, or of all Parquet files of a directory in the order of their names.

        Raises RunError where a file is damaged.
        """
        if not node.endswith(".parquet"):
            return pa.concat_tables(self.read_table(part, columns) for part in self.parts(node))
        with self.filesystem.open(self.path(node), "rb") as file:
            try:
                return pq.read_table(
                    file, columns=None if columns is None else list(columns), page_checksum_verification=True
                )
            except (pa.ArrowException, OSError) as error:
                if not _is_damage(error):
                    raise
                raise self._damaged(node, error) from error

    def write_table(self, node: str, table: pa.Table, *, inputs: str | None = None) -> None:
        """Write a Parquet file whole; `inputs`, the digest of what it was made from, is recorded in it."""
        buffer = io.BytesIO()
        marked = table.replace_schema_metadata({INPUTS: inputs} if inputs else None)
        pq.write_table(marked, buffer, write_page_checksum=True)
        self.write_bytes(node, buffer.getvalue())

    def inputs_of(self, node: str) -> str | None:
        """The digest that a Parquet file was written with, None if it has none or is damaged. Reads only its footer."""
        try:
            with self.filesystem.open(self.path(node), "rb") as file:
                recorded = (pq.read_schema(file).metadata or {}).get(INPUTS)
        except (pa.ArrowException, OSError) as error:
            if not _is_damage(error):
                raise
            return None
        return None if recorded is None else recorded.decode()

    def parts(self, node: str) -> list[str]:
        """The Parquet files of a directory of the run, as nodes, in the order of their names."""
        try:
            listed = self.filesystem.ls(self.path(node), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(f"{node}/{name}" for name in map(os.path.basename, listed) if is_table(name))

    def remove(self, node: str) -> None:
        """Remove a file or a directory, if it is there."""
        if self.is_local:
            place = self.local / node
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            else:
                place.unlink(missing_ok=True)
            return
        _side_by_side(self._remove_file, self.files(node))

    def remove_empty(self, node: str) -> None:
        """Remove a directory that holds nothing; object storage has none such."""
        with suppress(OSError):
            if self.is_local:
                (self.local / node).rmdir()

    def sweep(self) -> None:
        """Remove what a killed command left half written. Only for who knows that no other command works here."""
        if self.is_local:
            sweep(self.local)

    def fetch(self, node: str) -> Path:
        """A directory or file of the run as a path on this machine. Raises RunError if it is not there."""
        if not self.exists(node):
            raise RunError(f"{self.root} has no {node}.")
        if self.is_local:
            return self.local / node
        # Processes of one machine share the copies, so a copy has its own place for each content and never changes.
        files = self.files(node)
        content = digest([[path, state.size, state.stamp] for path, state in sorted(files.items())])
        path = self.local / content[:16] / os.path.basename(node)
        below = {_below(node, name): state.size for name, state in files.items()}
        if {name: _size(path / name) for name in below} != below:
            with written_directory(path.parent, within=self.local) as partial:
                self._download(node, files, partial / path.name)
        return path

    def download(self, node: str, target: Path) -> None:
        """Copy a directory or file of the run to a path of this machine."""
        self._download(node, self.files(node), target)

    def _download(self, node: str, files: Iterable[str], target: Path) -> None:
        def get(name: str) -> None:
            path = target / _below(node, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.filesystem.get_file(self.path(name), str(path))

        _side_by_side(get, files)

    @contextmanager
    def publishing(self, node: str, *, mark: str | None = None) -> Iterator[Path]:
        """Give an empty local directory; what the block leaves there becomes `node` when it ends well.

        mark: the file that vouches for the others. On object storage it is removed first and uploaded last: where it
        is, the others are whole. On a file system the directory comes whole, by a rename.
        """
        if self.is_local:
            with written_directory(self.local / node, within=self.local) as directory:
                yield directory
            return
        self.local.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=self.local) as scratch:
            directory = Path(scratch) / "whole"
            directory.mkdir()
            yield directory
            self._upload(node, directory, mark)

    def _upload(self, node: str, directory: Path, mark: str | None) -> None:
        given = {f"{node}/{path.relative_to(directory)}": path for path in walk(directory)}
        last = {f"{node}/{mark}"} & given.keys()
        _side_by_side(self._remove_file, last & self.files(node).keys())

        def put(target: str) -> None:
            self._make_parent(target)
            self.filesystem.put_file(str(given[target]), self.path(target))

        _side_by_side(put, given.keys() - last)
        _side_by_side(self._remove_file, self.files(node).keys() - given.keys())
        _side_by_side(put, last)

    def _remove_file(self, node: str) -> None:
        with suppress(FileNotFoundError):
            self.filesystem.rm_file(self.path(node))

    def _make_parent(self, node: str) -> None:
        self.filesystem.makedirs(os.path.dirname(self.path(node)), exist_ok=True)

    def _damaged(self, node: str, error: Exception) -> RunError:
        return RunError(
            f"{self.root}/{node} is damaged: {error}. Files of a run are written whole, so something else changed it. "
            "Delete it and run the same command again: it is made again, and what is whole is kept."
        )


def is_table(node: str) -> bool:
    """Whether a file is a table of ours by its name: hidden ones belong to other programs."""
    return node.endswith(".parquet") and not os.path.basename(node).startswith(".")


def _below(node: str, name: str) -> str:
    """The path of a file below a node; empty where the node is the file."""
    return "" if name == node else os.path.relpath(name, node)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _side_by_side(work: Callable[[str], None], names: Iterable[str]) -> None:
    """Do the work of every name, several at once; raises the first error once the others have ended."""
    with ThreadPoolExecutor(TRANSFERS) as threads:
        for _ in threads.map(work, sorted(names)):
            pass


def _is_damage(error: Exception) -> bool:
    """Whether Arrow could not make sense of a file's bytes, rather than not get them."""
    return isinstance(error, pa.ArrowInvalid) or (isinstance(error, OSError) and error.errno is None)
