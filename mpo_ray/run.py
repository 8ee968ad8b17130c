"""The run directory: where each thing lies, what is complete, and what it was made from (design 3).

Storage is a local directory or any fsspec URL. A stage builds its output in a local directory and publishes it whole;
where storage is local that is a rename, elsewhere an upload. `manifest.json` records, per stage, the digest of its
inputs: a stage whose record matches is complete and is not done again. A Parquet file records the digest of its own
inputs, so that a stage that is done again makes only what changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from mpo_ray.config import RunConfig
from mpo_ray.records import digest

#: Raised when a stage's output takes another form, so that an older run's output is made anew.
FORMAT = 2
#: Where a Parquet file, or a column of one, says what it was made from: a key of its Arrow metadata.
INPUTS = b"mpo_ray.inputs"
PACKAGES = ("mpo_ray", "torch", "transformers", "peft", "deepspeed", "ray", "datasets", "numpy")


class RunError(ValueError):
    """The run directory cannot be used as asked: another config began it, an output is missing, or it is read-only."""


class StageError(RuntimeError):
    """A stage could not be finished. What was complete stays, and the same command goes on from there."""


class Run:
    """One run directory. `root` is an absolute local path or an fsspec URL; `local` is a directory on this machine."""

    def __init__(self, storage: str, name: str) -> None:
        self.is_local = "://" not in storage or storage.startswith("file://")
        if self.is_local:
            self.root = str(Path(storage.removeprefix("file://")).absolute() / name)
            self.local = Path(self.root)
        else:
            self.root = f"{storage.rstrip('/')}/{name}"
            self.local = Path(tempfile.gettempdir()) / "mpo_ray" / hashlib.sha256(self.root.encode()).hexdigest()[:16]
        self.name = name
        try:
            # Other processes write here too: a cached listing would hide what they have finished.
            self._fs, self._base = fsspec.core.url_to_fs(self.root, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise RunError(
                f"storage {self.root} cannot be used: {error}. Set `storage:` to a directory, or to a URL whose fsspec "
                "package is installed (s3fs for s3://, gcsfs for gs://)."
            ) from error

    @classmethod
    def open(cls, config: RunConfig, *, update: bool = False) -> Run:
        """Open, or begin, the run of `config`.

        A directory that another config began is refused, unless `update` says that this one replaces it: then the
        stages whose inputs changed are done again. Raises RunError.
        """
        run = cls.check(config, update=update)
        if run.read_config() != config.as_json():
            run.write_text("config.yaml", yaml.safe_dump(config.as_json(), sort_keys=False, allow_unicode=True))
        if run.is_local:
            for left_over in run.local.glob(".partial-*"):  # of a process that was killed
                shutil.rmtree(left_over, ignore_errors=True)
        return run

    @classmethod
    def check(cls, config: RunConfig, *, update: bool = False) -> Run:
        """What `open` checks, without beginning the run. Raises RunError."""
        run = cls(config.storage, config.name)
        run.check_writable()
        stored = run.read_config()
        # A run directory that was moved is the same run, and how it is served changes nothing in it.
        here = {key: config.as_json()[key] for key in ("storage", "serve")}
        if stored is not None and {**stored, **here} != config.as_json() and not update:
            key, old, new = _first_difference({**stored, **here}, config.as_json())
            raise RunError(
                f"{run.root} belongs to another config: {key} is {old!r} there and {new!r} here. Choose "
                "another `name:`, or pass --update to change this run (stages whose inputs changed are done again)."
            )
        return run

    @classmethod
    def at(cls, root: str) -> Run:
        """Open an existing run directory by its path or URL. Raises RunError where there is none."""
        storage, _, name = root.rstrip("/").rpartition("/")
        run = cls(storage or ".", name)
        if run.read_config() is None:
            raise RunError(f"{run.root} is not a run directory: it has no config.yaml. `mpo-ray run CONFIG` makes one.")
        return run

    def check_writable(self) -> None:
        """Write, read and delete a small file in storage. Raises RunError with the cause."""
        probe = f".probe-{os.getpid()}-{time.time_ns()}"
        try:
            self.write_text(probe, "mpo_ray")
            if self.read_text(probe) != "mpo_ray":
                raise OSError("what was written could not be read back")
            self._fs.rm_file(f"{self._base}/{probe}")
        except Exception as error:
            raise RunError(
                f"storage {self.root} cannot be written: {error}. Set `storage:` to a directory or URL that you may "
                "write to."
            ) from error

    # ---- files -------------------------------------------------------------------------------------------------

    def exists(self, node: str) -> bool:
        return bool(self._fs.exists(f"{self._base}/{node}"))

    def read_text(self, node: str) -> str | None:
        """Content of a file, None if there is none."""
        if not self.exists(node):
            return None
        return str(self._fs.cat_file(f"{self._base}/{node}").decode("utf-8"))

    def write_text(self, node: str, text: str) -> None:
        self.write_bytes(node, text.encode("utf-8"))

    def write_bytes(self, node: str, content: bytes) -> None:
        """Write a file whole: a reader sees the old content or the new, never a part."""
        target = f"{self._base}/{node}"
        self._fs.makedirs(os.path.dirname(target), exist_ok=True)
        if not self.is_local:
            self._fs.pipe_file(target, content)
            return
        partial = Path(f"{target}.partial-{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(target)

    def read_json(self, node: str) -> Any:
        text = self.read_text(node)
        return None if text is None else json.loads(text)

    def write_json(self, node: str, value: Any) -> None:
        self.write_text(node, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_config(self) -> dict[str, Any] | None:
        text = self.read_text("config.yaml")
        return None if text is None else yaml.safe_load(text)

    def read_table(self, node: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a Parquet file, or of all Parquet files of a directory in the order of their names."""
        if not node.endswith(".parquet"):
            return pa.concat_tables(self.read_table(part, columns) for part in self.parts(node))
        with self._fs.open(f"{self._base}/{node}", "rb") as file:
            return pq.read_table(file, columns=None if columns is None else list(columns))

    def write_table(self, node: str, table: pa.Table, *, inputs: str | None = None) -> None:
        """Write a Parquet file whole; `inputs`, the digest of what it was made from, is recorded in it."""
        buffer = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({INPUTS: inputs} if inputs else None), buffer)
        self.write_bytes(node, buffer.getvalue())

    def inputs_of(self, node: str) -> str | None:
        """The digest that a Parquet file was written with, None if it has none or is damaged. Reads only its footer."""
        try:
            with self._fs.open(f"{self._base}/{node}", "rb") as file:
                recorded = (pq.read_schema(file).metadata or {}).get(INPUTS)
        except pa.ArrowInvalid:
            return None
        return None if recorded is None else recorded.decode()

    def parts(self, node: str) -> list[str]:
        """The Parquet files below a directory of the run, as nodes, in the order of their names."""
        found = self._fs.glob(f"{self._base}/{node}/*.parquet")
        return sorted(f"{node}/{os.path.basename(path)}" for path in found)

    def remove(self, node: str) -> None:
        if self.exists(node):
            self._fs.rm(f"{self._base}/{node}", recursive=True)

    def fetch(self, node: str) -> Path:
        """A directory or file of the run as a path on this machine. Raises RunError if it is not there."""
        if not self.exists(node):
            raise RunError(f"{self.root} has no {node}.")
        if self.is_local:
            return self.local / node
        # Processes of one machine share the copies, so a copy has its own place for each content and never changes.
        source = f"{self._base}/{node}"
        content = digest([[path, self._fs.ukey(path)] for path in sorted(self._fs.find(source))])
        path = self.local / content[:16] / os.path.basename(node)
        if not path.exists():
            path.parent.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.local))
            try:
                self._fs.get(source, str(partial / path.name), recursive=True)
                with suppress(OSError):  # another process was first
                    partial.rename(path.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return path

    @contextmanager
    def publishing(self, node: str) -> Iterator[Path]:
        """Give an empty local directory; what the block leaves there becomes `node`, whole, when it ends well."""
        self.local.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.local))
        try:
            yield partial
            partial.chmod(0o755)
            self._replace(node, partial)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _replace(self, node: str, directory: Path) -> None:
        target = f"{self._base}/{node}"
        if not self.is_local:
            if self._fs.exists(target):
                self._fs.rm(target, recursive=True)
            self._fs.put(f"{directory}/", f"{target}/", recursive=True)
            return
        old = directory.with_name(f"{directory.name}-old")
        if os.path.exists(target):
            os.rename(target, old)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        directory.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    # ---- completeness and provenance ---------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        return self.read_json("manifest.json") or {"format": FORMAT, "stages": {}}

    def is_complete(self, stage: str, inputs: str) -> bool:
        """Whether `stage` was finished from inputs with this digest, and its outputs are still there."""
        record = self.manifest()["stages"].get(stage)
        return record is not None and record["inputs"] == inputs and all(self.exists(n) for n in record["outputs"])

    def begin_stage(self, stage: str) -> None:
        """Forget that `stage` was finished: its output is about to change."""
        manifest = self.manifest()
        if manifest["stages"].pop(stage, None) is not None:
            self.write_json("manifest.json", manifest)

    def complete(self, stage: str, inputs: str, *, outputs: list[str], seconds: float, notes: Any = None) -> None:
        """Record that `stage` is finished. Only the driver of the run calls this."""
        manifest = self.manifest()
        manifest["versions"] = {name: _version(name) for name in PACKAGES}
        manifest["stages"][stage] = {
            "inputs": inputs,
            "outputs": outputs,
            "seconds": round(seconds, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "notes": notes,
        }
        self.write_json("manifest.json", manifest)


def stage_inputs(*values: object) -> str:
    """Digest of everything that a stage's output depends on."""
    return digest([FORMAT, *values])


def file_digest(path: str) -> str:
    """SHA-256 of a file's content (local path or URL), read in blocks."""
    sha = hashlib.sha256()
    with fsspec.open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def directory_digest(path: str | Path) -> str:
    """One digest for the files of a local directory: their relative names and contents."""
    root = Path(path)
    return digest([[str(f.relative_to(root)), file_digest(str(f))] for f in sorted(root.rglob("*")) if f.is_file()])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_difference(old: Any, new: Any, place: str = "") -> tuple[str, Any, Any]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(k for k in old if k not in new)]:
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{place}.{key}" if place else str(key))
    return place, old, new
