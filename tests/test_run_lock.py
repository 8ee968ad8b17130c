"""One command at a time on a run, and no lock outlives its command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from mpo_ray import run_lock
from mpo_ray.run import Run
from mpo_ray.run_lock import LOCK, Holder, LockedError, locked, read_lock
from tests.tiny_run import ROOT, environment

#: Takes the lock of a run, says so, and works until it is ended.
HOLD = """
import sys, time
from mpo_ray.run import Run
from mpo_ray.run_lock import locked
with locked(Run(sys.argv[1], "run"), "mpo-ray run"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(run_lock, "SETTLE_S", 0.0)
    return Run(str(tmp_path) if request.param == "local" else f"memory://{uuid4().hex}", "run")


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of the run in `tmp_path`."""
    given = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(given, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def _leave(run: Run, **changes: Any) -> Holder:
    """The lock of a command that is not this one."""
    holder = replace(Holder.this_process("mpo-ray run", run.root), **changes)
    run.write_bytes(LOCK, holder.as_bytes())
    return holder


def test_a_second_command_is_refused_while_the_first_works(run: Run) -> None:
    """By name, process, host and time; afterwards the run is free."""
    with locked(run, "mpo-ray train"):
        said = rf"in use by `mpo-ray train`, process {os.getpid()} on .* UTC\. .*wait"
        with pytest.raises(LockedError, match=said), locked(run, "mpo-ray run"):
            pytest.fail("two commands hold the lock")
        assert run.exists(LOCK)
    assert not run.exists(LOCK)
    with locked(run, "mpo-ray run"):
        pass


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_the_lock_of_a_killed_command_is_taken_over(
    holder: subprocess.Popen[str], tmp_path: Path, sent: signal.Signals
) -> None:
    """At once, also while nobody has asked how the process ended."""
    run = Run(str(tmp_path), "run")
    with pytest.raises(LockedError, match=f"process {holder.pid} "), locked(run, "mpo-ray run"):
        pytest.fail("two commands hold the lock")
    os.kill(holder.pid, sent)
    deadline = time.monotonic() + 20
    while run_lock._lives(read_lock(run) or pytest.fail("the lock is gone")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with locked(run, "mpo-ray run"):
        assert (read_lock(run) or pytest.fail("no lock")).pid == os.getpid()
    assert not list(run.local.iterdir())


def test_a_later_process_with_the_same_number_holds_nothing(run: Run) -> None:
    _leave(run, started=Holder.this_process("", "").started - 100.0)
    with locked(run, "mpo-ray run"):
        holder = read_lock(run)
        assert holder is not None
        assert holder.command == "mpo-ray run"


def test_a_lock_that_came_with_a_copy_holds_nothing(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    """The command works on the original, which stays locked."""
    shutil.copytree(tmp_path / "run", tmp_path / "copies" / "run")
    with locked(Run(str(tmp_path / "copies"), "run"), "mpo-ray run"):
        pass
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(LockedError), locked(Run(str(tmp_path / "link"), "run"), "mpo-ray run"):
        pytest.fail("the same run by another path")


def test_another_machine_is_believed_while_its_lock_moves(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recent: held. Silent for long, or by a wrong clock: watched for a beat; held if it moves, else taken over."""
    monkeypatch.setattr(run_lock, "BEAT_S", 0.01)
    said: list[str] = []
    other = {"host": "far", "machine": "far 1", "pid": 1}
    _leave(run, **other)
    with pytest.raises(LockedError, match="process 1 on far"), locked(run, "mpo-ray run", say=said.append):
        pytest.fail("it was beating")
    assert said == []
    for silent in (-1000.0, +1000.0):
        held = _leave(run, **other, beat_at=time.time() + silent)
        monkeypatch.setattr(time, "sleep", lambda _, held=held: run.write_bytes(LOCK, replace(held, beat=9).as_bytes()))
        with pytest.raises(LockedError), locked(run, "mpo-ray run", say=said.append):
            pytest.fail("it moved")
        monkeypatch.undo()
        monkeypatch.setattr(run_lock, "BEAT_S", 0.01)
        monkeypatch.setattr(run_lock, "SETTLE_S", 0.0)
        with locked(run, "mpo-ray run", say=said.append):
            pass
    assert len(said) == 4
    assert "has been silent. Watching it" in said[0]


def test_a_lock_beats(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.01)
    with locked(run, "mpo-ray run"):
        deadline = time.monotonic() + 10
        while (read_lock(run) or pytest.fail("no lock")).beat < 2:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_a_command_whose_lock_was_taken_records_nothing(run: Run) -> None:
    """It was suspended for longer than its lock is believed, say. The other's lock stays."""
    with locked(run, "mpo-ray run"):
        run.complete("a", "1", outputs=[], seconds=0.0)
        other = _leave(run, host="far", machine="far 1")
        with pytest.raises(LockedError, match=r"is now held by .* on far"):
            run.complete("b", "2", outputs=[], seconds=0.0)
        assert list(run.manifest()["stages"]) == ["a"]
    assert read_lock(run) == other


def test_a_lock_of_a_later_version_is_understood(run: Run) -> None:
    """Fields that this version does not know are left alone; what is no lock at all is nobody's."""
    values = {**asdict(Holder.this_process("mpo-ray run", run.root)), "new": 1}
    run.write_bytes(LOCK, json.dumps(values).encode())
    with pytest.raises(LockedError), locked(run, "mpo-ray run"):
        pytest.fail("held")
    for nonsense in (b"", b"[]", b'{"pid": '):
        run.write_bytes(LOCK, nonsense)
        with locked(run, "mpo-ray run"):
            pass
