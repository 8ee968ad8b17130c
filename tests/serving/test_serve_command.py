"""`mpo-ray serve` as a process that is told to stop before it serves."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mpo_ray.serving.ports import free_port
from tests.serving.served import write_mixture


@pytest.mark.slow
def test_a_signal_while_it_starts_ends_it_with_one_line(tmp_path: Path) -> None:
    """SIGTERM is treated as Ctrl-C is."""
    command = [sys.executable, "-m", "mpo_ray", "serve", str(write_mixture(tmp_path)), "--port", str(free_port())]
    said, told = tmp_path / "said", tmp_path / "told"
    with said.open("wb") as output, told.open("wb") as errors:
        serving = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=errors)
    try:
        children = _replica_starts(serving)
        assert "Serving" not in said.read_text(encoding="utf-8")
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(60) == 130
    finally:
        if serving.poll() is None:
            serving.kill()
            serving.wait()
    text = told.read_text(encoding="utf-8")
    assert "Traceback" not in text
    assert text.count("mpo-ray serve: interrupted; what was complete is kept.\n") == 1
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def _replica_starts(serving: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Wait for the first process of a replica; returns all that belong to the command."""
    end = time.monotonic() + 240
    while True:
        assert serving.poll() is None, f"it ended with {serving.returncode}"
        assert time.monotonic() < end, "no replica starts"
        children = psutil.Process(serving.pid).children(recursive=True)
        if any("ServeReplica" in _name(one) for one in children):
            return children
        time.sleep(0.05)


def _name(process: psutil.Process) -> str:
    """Empty for one that has ended meanwhile."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""
