"""Files and directories that are written whole, with the permissions that the umask gives."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mpo_ray.whole_files import PARTIAL, create_file, move_file, sweep, write_file, written_directory


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_permissions_follow_the_umask_whoever_wrote_the_files(umask: int, tmp_path: Path) -> None:
    """safetensors makes its files for their owner alone; a program stays one; what was there before decides nothing."""
    target = tmp_path / "runs" / "base"
    for _ in range(2):
        with written_directory(target) as directory:
            (directory / "deeper").mkdir()
            (directory / "config.json").write_text("{}")
            for name, mode in {"deeper/model.safetensors": 0o600, "tool": 0o700}.items():
                (directory / name).write_bytes(b"x")
                (directory / name).chmod(mode)
    write_file(tmp_path / "runs" / "fit.json", b"{}")
    assert create_file(tmp_path / "runs" / "lock.json", b"{}")
    for path in (target, target / "deeper", tmp_path / "runs"):
        assert _mode(path) == 0o777 & ~umask
    for name in ("base/config.json", "base/deeper/model.safetensors", "fit.json", "lock.json"):
        assert _mode(tmp_path / "runs" / name) == 0o666 & ~umask
    assert _mode(target / "tool") == (0o666 & ~umask) | 0o100


def test_a_full_disk_is_told_of_with_its_place_and_leaves_what_was_there(tmp_path: Path) -> None:
    """A limit on the size of files stands for it."""
    write_file(tmp_path / "fit.json", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(tmp_path))):
            write_file(tmp_path / "fit.json", b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["fit.json"]
    assert (tmp_path / "fit.json").read_bytes() == b"old"


def test_content_is_on_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of every file, then the rename, then fsync of the directory that holds the name."""
    done: list[str] = []

    def record(what: str, real: object) -> object:
        def call(*given: object, **named: object) -> object:
            subject = os.readlink(f"/proc/self/fd/{given[0]}") if what == "fsync" else str(given[1])
            done.append(f"{what} {Path(subject).name if not Path(subject).name.startswith(PARTIAL) else 'partial'}")
            return real(*given, **named)  # type: ignore[operator]

        return call

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, record(name, getattr(os, name)))
    (tmp_path / "run").mkdir()
    write_file(tmp_path / "run" / "fit.json", b"{}")
    assert done == ["fsync partial", "replace fit.json", "fsync run"]
    done.clear()
    with written_directory(tmp_path / "run" / "base") as directory:
        (directory / "weights").write_bytes(b"x")
    assert done[:2] == ["fsync weights", "fsync partial"]
    assert done[-2:] == ["rename base", "fsync run"]
    done.clear()
    (tmp_path / "weights").write_bytes(b"x")
    move_file(tmp_path / "weights", tmp_path / "run" / "deeper" / "weights")
    assert done == ["fsync run", "fsync weights", "replace weights", "fsync deeper"]


def test_of_several_that_create_a_file_one_does(tmp_path: Path) -> None:
    """Its content is that one's, and nothing else is left."""
    with ThreadPoolExecutor(8) as threads:
        for round_ in range(20):
            path = tmp_path / str(round_)
            won = list(threads.map(lambda n, path=path: create_file(path, str(n).encode()), range(8)))  # type: ignore[misc]
            assert won.count(True) == 1
            assert path.read_bytes() == str(won.index(True)).encode()
    assert len(list(tmp_path.iterdir())) == 20


def test_two_that_put_a_directory_in_place_leave_one_whole(tmp_path: Path) -> None:
    def write(name: str) -> None:
        for _ in range(10):
            with written_directory(tmp_path / "report") as directory:
                (directory / "a").write_text(name)
                (directory / "b").write_text(name)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, "wxyz"))
    assert (tmp_path / "report" / "a").read_text() == (tmp_path / "report" / "b").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / "a" / f"{PARTIAL}1").mkdir(parents=True)
    (tmp_path / "a" / f"{PARTIAL}1" / "x").write_text("half")
    (tmp_path / "a" / f"{PARTIAL}2").write_text("half")
    (tmp_path / "a" / "whole").write_text("whole")
    sweep(tmp_path)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["whole"]
