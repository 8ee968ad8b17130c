"""The run directory: what is complete, and what it was made from (design 3).

`manifest.json` records, per stage, the digest of its inputs, and the size and SHA-256 of every file it made. A stage
whose record matches is complete and is not done again. A Parquet file records the digest of its own inputs, so that a
stage that is done again makes only what changed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fsspec
import yaml

from mpo_ray.config import RunConfig
from mpo_ray.file_listing import FileState
from mpo_ray.records import digest
from mpo_ray.storage import RunError, Storage, is_table

#: Raised when a stage's output takes another form, so that an older run's output is made anew.
FORMAT = 2
#: Files on object storage that are fetched for their digest, at most, in bytes.
SMALL = 1 << 20
PACKAGES = ("mpo_ray", "torch", "transformers", "peft", "deepspeed", "ray", "datasets", "numpy")


class StageError(RuntimeError):
    """A stage could not be finished. What was complete stays, and the same command goes on from there."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A stage's record beside what is there. damaged: node → what is wrong with it; renewed: whether marks moved on."""

    record: dict[str, Any]
    damaged: dict[str, str]
    renewed: bool = False


class Run(Storage):
    """One run directory."""

    #: Called before the manifest changes; a command that holds the run's lock has it raise once the lock is lost.
    still_ours: Callable[[], None] = staticmethod(lambda: None)

    @classmethod
    def open(cls, config: RunConfig, *, update: bool = False) -> Run:
        """Open, or begin, the run of `config`.

        A directory that another config began is refused, unless `update` says that this one replaces it: then the
        stages whose inputs changed are done again. Raises RunError.
        """
        run = cls.check(config, update=update)
        run.begin(config)
        return run

    def begin(self, config: RunConfig) -> None:
        """Write down whose run it is, and remove what a killed command left half written."""
        text = yaml.safe_dump(config.as_json(), sort_keys=False, allow_unicode=True)
        if self.read_text("config.yaml") != text:
            self.write_text("config.yaml", text)
        self.sweep()

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

    # ---- completeness and provenance ---------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """What is recorded of the stages. A manifest that cannot be read counts as none: see `manifest_problem`.

        So does the record of a stage that makes no sense.
        """
        found = {} if self.manifest_problem() is not None else self.read_json("manifest.json") or {}
        stages = {name: record for name, record in found.get("stages", {}).items() if _is_record(record)}
        return {"format": FORMAT, **found, "stages": stages}

    def manifest_problem(self) -> str | None:
        """Why manifest.json cannot be read, None if it can. Each stage then looks for what is there by its inputs."""
        try:
            found = self.read_json("manifest.json")
        except RunError as error:
            return f"{self.root}/manifest.json cannot be read: {error.__cause__}."
        if found is None or (isinstance(found, dict) and isinstance(found.get("stages"), dict)):
            return None
        return f"{self.root}/manifest.json cannot be read: it has no stages."

    def is_complete(self, stage: str, inputs: str) -> bool:
        """Whether `stage` was finished from inputs with this digest, and what it made is there as it was made."""
        found = self.finished(stage, inputs)
        return found is not None and not found.damaged

    def finished(self, stage: str, inputs: str) -> Finished | None:
        """The record of a stage that was finished from inputs with this digest, beside what is there; else None.

        One listing compares the size of every file. On a file system, one whose time of change is not that of the
        record is read and its SHA-256 compared; on object storage, where the hash in the listing (or the time) is
        another, only files of up to `SMALL` bytes that are no tables.
        """
        record = self.manifest()["stages"].get(stage)
        if record is None or record["inputs"] != inputs:
            return None
        if "files" not in record:  # as earlier versions recorded a stage
            return Finished(record, {node: "is missing" for node in record["outputs"] if not self.exists(node)})
        there: dict[str, FileState] = {}
        for node in record["outputs"]:
            there |= self.files(node)
        damaged = {node: "belongs to no part" for node in there.keys() - record["files"].keys() if is_table(node)}
        files = dict(record["files"])
        for node, (size, stamp, sha) in record["files"].items():
            state = there.get(node)
            if state is None:
                damaged[node] = "is missing"
            elif state.size != size:
                damaged[node] = f"has {state.size} bytes instead of {size}"
            elif state.stamp != stamp:
                if sha is not None and self._digest(node, state) != sha:
                    damaged[node] = "has another content than was written"
                files[node] = [size, state.stamp, sha]
        return Finished({**record, "files": files}, damaged, renewed=files != record["files"])

    def renew(self, stage: str, found: Finished) -> None:
        """Record that files whose times changed were read, and are what they were, so that they are not read again."""
        self._record(stage, found.record)

    def discard(self, found: Finished) -> None:
        """Remove the files that are not what was recorded, so that nothing takes them for whole."""
        for node in found.damaged:
            self.remove(node)

    def begin_stage(self, stage: str) -> None:
        """Forget that `stage` was finished: its output is about to change."""
        if stage in self.manifest()["stages"]:
            self._record(stage, None)

    def complete(self, stage: str, inputs: str, *, outputs: list[str], seconds: float, notes: Any = None) -> None:
        """Record that `stage` is finished. Only the driver of the run calls this."""
        files: dict[str, FileState] = {}
        for node in outputs:
            files |= self.files(node)
        record = {
            "inputs": inputs,
            "outputs": outputs,
            "seconds": round(seconds, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "notes": notes,
            "files": {node: [state.size, state.stamp, self._digest(node, state)] for node, state in files.items()},
        }
        self._record(stage, record)

    def _record(self, stage: str, record: dict[str, Any] | None) -> None:
        """Write the manifest with another record of one stage, or without it."""
        self.still_ours()
        manifest = self.manifest()
        manifest["versions"] = {name: _version(name) for name in PACKAGES}
        manifest["stages"].pop(stage, None)
        if record is not None:
            manifest["stages"][stage] = record
        self.write_json("manifest.json", manifest)

    def _digest(self, node: str, state: FileState) -> str | None:
        """SHA-256 of a file, None where it would have to be fetched and is large or a table, whose pages have sums."""
        if self.is_local:
            return file_digest(str(self.local / node))
        if state.size > SMALL or is_table(node):
            return None
        return hashlib.sha256(self.read_bytes(node) or b"").hexdigest()


def stage_inputs(*values: object) -> str:
    """Digest of everything that a stage's output depends on."""
    return digest([FORMAT, *values])


def file_digest(path: str) -> str:
    """SHA-256 of a file's content (local path or URL), read in blocks."""
    sha = hashlib.sha256()
    with fsspec.open(path, "rb") if "://" in path else Path(path).expanduser().open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def directory_digest(path: str | Path) -> str:
    """One digest for the files of a local directory: their relative names and contents."""
    root = Path(path)
    return digest([[str(f.relative_to(root)), file_digest(str(f))] for f in sorted(root.rglob("*")) if f.is_file()])


def _is_record(record: Any) -> bool:
    """Whether this is what `complete` records of a stage, now or in earlier versions."""
    if not isinstance(record, dict) or not isinstance(record.get("inputs"), str):
        return False
    outputs, files = record.get("outputs"), record.get("files", {})
    if not isinstance(outputs, list) or not isinstance(files, dict):
        return False
    return all(isinstance(state, list) and len(state) == 3 for state in files.values())


@cache
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
