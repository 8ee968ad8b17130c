"""`ray job submit` runs the whole pipeline on a head that was started for it, with the weights of a local run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.tiny_run import ROOT, environment, overrides

pytestmark = pytest.mark.slow
RAY = str(Path(sys.executable).parent / "ray")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard's address of a head of its own, on free ports; its processes are ended by their ids."""
    dashboard = _free_port()
    arguments = [
        *(RAY, "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"),
        *(f"--port={_free_port()}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
        *(f"--dashboard-agent-listen-port={_free_port()}", f"--ray-client-server-port={_free_port()}"),
        *("--object-store-memory=200000000", f"--temp-dir={tmp_path_factory.mktemp('ray')}"),
    ]
    log = (tmp_path_factory.mktemp("head") / "log").open("w")
    process = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment())
    try:
        _wait_until_open(dashboard, process)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        process.send_signal(signal.SIGTERM)
        psutil.wait_procs([psutil.Process(pid) for pid in family if psutil.pid_exists(pid)], timeout=20)
        for pid in family:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        log.close()


def _wait_until_open(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the head ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError("the dashboard did not open")


@pytest.mark.timeout(600)
def test_a_submitted_job_runs_the_pipeline_and_agrees_with_a_local_run(
    head: str, finished_run: Path, tmp_path: Path
) -> None:
    given = [argument for item in overrides(tmp_path, "submitted") for argument in ("--set", item)]
    job = ["python", "jobs/pipeline.py", "--config", "configs/quickstart.yaml", *given]
    excluded = json.dumps({"excludes": [".git"]})
    done = subprocess.run(
        [RAY, "job", "submit", "--address", head, "--working-dir", ".", "--runtime-env-json", excluded, "--", *job],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "report: " in done.stdout
    weights = [json.loads((r / "fit.json").read_text())["weights"] for r in (tmp_path / "submitted", finished_run)]
    assert weights[0] == weights[1]
