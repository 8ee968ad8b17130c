"""One command at a time writes into a run: `lock.json` in the run directory names it while it works.

A lock whose command is gone is taken over. On the same machine its process decides: it has ended, or its number belongs
to a later one. On another machine the lock's beat decides, a number that its command raises every `BEAT_S` seconds. On
object storage without conditional uploads (`Storage.create`) two commands that begin in the same moment may both hold a
lock; the one that was overwritten stops before it next records a stage.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import psutil

from mpo_ray.run import Run
from mpo_ray.storage import RunError, Storage

LOCK = "lock.json"
BEAT_S = 15.0
#: A lock of another machine that has not moved for so long is watched for a beat, and then taken over.
SILENT_S = 120.0
#: What a process's start may differ by when it is read again: the clock of a machine is adjusted while it runs.
START_TOLERANCE_S = 2.0
#: After a lock was taken over on object storage: by then another that did the same has written.
SETTLE_S = 1.0


class LockedError(RunError):
    """Another command works on the run."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock. machine: one boot of one machine, and one space of process numbers; times: Unix, seconds."""

    token: str
    command: str
    root: str
    host: str
    machine: str
    pid: int
    started: float
    since: float
    beat: int = 0
    beat_at: float = 0.0

    @classmethod
    def this_process(cls, command: str, root: str) -> Holder:
        now, process = time.time(), psutil.Process()
        return cls(
            token=uuid.uuid4().hex,
            command=command,
            root=root,
            host=socket.gethostname(),
            machine=_machine(),
            pid=process.pid,
            started=process.create_time(),
            since=now,
            beat_at=now,
        )

    def as_bytes(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"`{self.command}`, process {self.pid} on {self.host}, since {since}"


@contextmanager
def locked(run: Run, command: str, *, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the run's lock while the block runs. `say` gets a line where a silent lock is watched for a beat.

    Raises LockedError where another command holds it.
    """
    mine = Holder.this_process(command, run.root)
    _acquire(run, mine, say)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(run, mine, ended), daemon=True, name="run lock")
    beating.start()
    run.still_ours = lambda: _check(run, mine)
    try:
        yield
    finally:
        ended.set()
        beating.join()
        if _is_ours(read_lock(run), mine):
            run.remove(LOCK)


def read_lock(run: Storage) -> Holder | None:
    """Who holds the lock, None if nobody. A lock that makes no sense is nobody's: it is only ever written whole."""
    content = run.read_bytes(LOCK)
    try:
        if content is None:
            return None
        values, names = json.loads(content), {field.name for field in fields(Holder)}
        return Holder(**{name: value for name, value in values.items() if name in names})
    except (ValueError, TypeError, AttributeError):
        return None


def _acquire(run: Run, mine: Holder, say: Callable[[str], None]) -> None:
    if run.create(LOCK, mine.as_bytes()):
        return
    other = read_lock(run)
    if other is not None and _works(run, other, say):
        raise LockedError(
            f"{run.root} is in use by {other}. Two commands at once would spoil each other's work: wait for it, or end "
            f"it. If you know that it no longer runs, delete {run.root}/{LOCK}."
        )
    _set_aside(run, other)
    taken = run.create(LOCK, mine.as_bytes())
    if not run.is_local:
        time.sleep(SETTLE_S)
    now = read_lock(run)
    if not taken or not _is_ours(now, mine):
        raise LockedError(f"{run.root} was taken by {now} in this moment. Wait for it, or end it.")


def _set_aside(run: Run, other: Holder | None) -> None:
    """Remove a lock whose command is gone, unless it is no longer the one that was looked at."""
    if not run.is_local:
        if read_lock(run) == other:
            run.remove(LOCK)
        return
    lock, aside = run.local / LOCK, run.local / f".partial-{uuid.uuid4().hex[:16]}"
    try:
        lock.rename(aside)
    except FileNotFoundError:
        return
    content = aside.read_bytes()
    if other is not None and json.loads(content)["token"] != other.token:
        run.create(LOCK, content)  # another command took it over before us: give it back
    aside.unlink()


def _works(run: Run, other: Holder, say: Callable[[str], None]) -> bool:
    """Whether the command that wrote a lock is still at work on this run."""
    if other.machine == _machine():
        return _lives(other) and not _was_copied(run, other)
    if abs(time.time() - other.beat_at) < SILENT_S:
        return True
    say(f"{run.root} was in use by {other}, which has been silent. Watching it for {1.5 * BEAT_S:.0f} s.")
    time.sleep(1.5 * BEAT_S)
    return read_lock(run) != other


def _lives(other: Holder) -> bool:
    """Whether the process of a lock of this machine is there, and is not a later one with its number."""
    try:
        process = psutil.Process(other.pid)
        started, has_ended = float(process.create_time()), bool(process.status() == psutil.STATUS_ZOMBIE)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return bool(psutil.pid_exists(other.pid))  # one that /proc hides from other users
    return not has_ended and abs(started - other.started) < START_TOLERANCE_S


def _was_copied(run: Run, other: Holder) -> bool:
    """Whether the lock came here with a copy of the directory that its command works on."""
    if not run.is_local or other.root == run.root:
        return other.root != run.root
    there = Path(other.root) / LOCK
    return not there.exists() or not there.samefile(run.local / LOCK)


def _beat(run: Run, mine: Holder, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        try:
            if not _is_ours(read_lock(run), mine):
                return
            mine = replace(mine, beat=mine.beat + 1, beat_at=time.time())
            run.write_bytes(LOCK, mine.as_bytes())
        except OSError:
            continue  # storage that is out of reach for a moment; the next beat may reach it


def _check(run: Run, mine: Holder) -> None:
    other = read_lock(run)
    if not _is_ours(other, mine):
        who = "was removed" if other is None else f"is now held by {other}"
        raise LockedError(
            f"the lock of {run.root} {who}, so another command may be at work there. This one stops; what it finished "
            "is kept."
        )


def _is_ours(holder: Holder | None, mine: Holder) -> bool:
    return holder is not None and holder.token == mine.token


def _machine() -> str:
    """This boot of this machine and, in a container, its own space of process numbers."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if path.endswith("pid") else Path(path).read_text().strip())
        except OSError:  # no Linux
            parts.append("")
    return " ".join(parts)
