"""`ray job submit` on a head that was started for it: the pipeline, and MOPO with its metrics."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from mpo_ray.serving.ports import free_port
from tests.tiny_run import ROOT, environment, overrides, without

pytestmark = pytest.mark.slow
RAY = str(Path(sys.executable).parent / "ray")
MOPO = {
    "problems": {"kind": {"primary": "positive", "bounds": {"concise": 0.5, "detailed": "reference - 0.1"}}},
    "radius": 1e-4,
    "training": {
        "method": "online",
        "epochs": 4,
        "batch_size": 4,
        "micro_batch_size": 2,
        "zero_stage": 2,
        "lag": 10,
        "workers": {"num_workers": 2, "max_failures": 0},
    },
}


class Head(NamedTuple):
    """Where a head listens: its dashboard, and what Prometheus reads."""

    dashboard: str
    metrics: str


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head of its own, on free ports; its processes are ended by their ids."""
    dashboard, metrics = free_port(), free_port()
    arguments = [
        *(RAY, "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"),
        *(f"--port={free_port()}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
        f"--metrics-export-port={metrics}",
        *(f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"),
        *("--object-store-memory=200000000", f"--temp-dir={tmp_path_factory.mktemp('ray')}"),
    ]
    log = (tmp_path_factory.mktemp("head") / "log").open("w")
    process = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment())
    try:
        for port in (dashboard, metrics):
            _wait_until_open(port, process)
        yield Head(f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics")
    finally:
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        process.send_signal(signal.SIGTERM)
        psutil.wait_procs([psutil.Process(pid) for pid in family if psutil.pid_exists(pid)], timeout=8)
        for pid in family:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        log.close()


def _wait_until_open(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, "the head ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"port {port} did not open")


def _submitted(head: Head, job: str, *arguments: str) -> list[str]:
    """The command that submits a job with the checkout and the small quickstart, and waits for its end."""
    excluded = json.dumps({"excludes": [".git"]})
    given = ["--address", head.dashboard, "--working-dir", ".", "--runtime-env-json", excluded]
    return [RAY, "job", "submit", *given, "--", "python", job, "--config", "configs/quickstart.yaml", *arguments]


def test_a_submitted_job_runs_the_pipeline_and_agrees_with_a_local_run(
    head: Head, finished_run: Path, tmp_path: Path
) -> None:
    """All but the training of the reference and of two policies, which are the finished run's."""
    run = without(finished_run, tmp_path, "concise", scored=False)
    given = [argument for item in overrides(tmp_path, run.name) for argument in ("--set", item)]
    done = subprocess.run(
        _submitted(head, "jobs/pipeline.py", *given),
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "report: " in done.stdout
    weights = [json.loads((r / "fit.json").read_text())["weights"] for r in (run, finished_run)]
    assert weights[0] == weights[1]


def test_mopo_is_submitted_and_its_metrics_are_at_the_head_while_it_trains(
    head: Head, finished_run: Path, tmp_path: Path
) -> None:
    """From the scores of a finished run to a policy on two workers, under the metrics that docs/mopo.md names."""
    shutil.copytree(finished_run, tmp_path / "bounded")
    items = [*overrides(tmp_path, "bounded"), f"mopo={json.dumps(MOPO)}"]
    given = [argument for item in items for argument in ("--set", item)]
    seen: set[str] = set()
    with (tmp_path / "log").open("w+") as log:
        job = subprocess.Popen(
            _submitted(head, "jobs/train_mopo.py", *given, "--update"),
            stdout=log,
            stderr=log,
            env=environment(),
            cwd=ROOT,
        )
        try:
            while job.poll() is None:
                with urllib.request.urlopen(head.metrics, timeout=10) as page:
                    seen.update(re.findall(r'ray_(mpo_ray_\w+)\{[^}]*training="mopo-kind"', page.read().decode()))
                time.sleep(0.5)
        finally:
            job.kill()
        log.seek(0)
        assert job.returncode == 0, log.read()[-5000:]
    assert (tmp_path / "bounded" / "mopo" / "kind" / "policy" / "adapter_model.safetensors").exists()
    assert seen == set(re.findall(r"`(mpo_ray_training_\w+)`", (ROOT / "docs" / "mopo.md").read_text()))
