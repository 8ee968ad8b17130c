"""The benchmarks run, on next to nothing, and both sides of each compute the same numbers."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
sys.path.insert(0, str(PROJECT / "benchmarks"))


def _run(name: str, *options: str, shared: Path) -> str:
    """The script's output; it exits with an error where the two sides disagree."""
    done = subprocess.run(
        [sys.executable, str(PROJECT / "benchmarks" / name), *options],
        env={**os.environ, "MPO_RAY_SHARED": str(shared), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _run_here(
    name: str, *options: str, shared: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """The same in this process, of a script that leaves nothing behind in it."""
    patch.setenv("MPO_RAY_SHARED", str(shared))
    patch.setattr(sys, "argv", [name, *options])
    status = importlib.import_module(name.removesuffix(".py")).main()
    said = capsys.readouterr()
    assert status == 0, said.out + said.err
    return said.out


def _ratio(output: str) -> float:
    found = re.search(r"^ratio of the medians, .*: ([\d.]+) \(goal", output, re.MULTILINE)
    assert found, output
    return float(found[1])


@pytest.mark.slow
def test_our_dpo_step_and_trls_give_the_same_losses(shared: Path) -> None:
    """Two steps, the second with updated weights; timings of so few mean nothing and are not judged."""
    pytest.importorskip("trl", reason="trl is in the extra `bench`: pip install 'mpo_ray[bench]'")
    output = _run("dpo_throughput.py", "--steps=1", "--repeats=3", "--batch-size=4", shared=shared)
    assert _ratio(output) > 0
    assert len(re.findall(r"^ +\d+ +\d\.\d{5} +\d\.\d{5} ", output, re.MULTILINE)) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_stage_stacked_and_separate_passes_give_the_same_scores(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--parts=3", "--prompts=2", "--samples=3", "--policies=2", "--batch-size=4", "--repeats=1")
    output = _run_here("score_throughput.py", *options, shared=shared, patch=monkeypatch, capsys=capsys)
    assert _ratio(output) > 0
    assert len(re.findall(r"^ratio of the medians, .*: \d", output, re.MULTILINE)) == 4


@pytest.mark.parametrize("name", ["dpo_throughput.py", "score_throughput.py"])
def test_without_the_testbed_a_benchmark_names_what_is_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = _run_here(name, shared=tmp_path, patch=monkeypatch, capsys=capsys)
    assert output == f"skipped: the testbed is not at {tmp_path / 'testbed' / 'imdb'}; set MPO_RAY_SHARED\n"


@pytest.mark.slow
def test_the_benchmark_of_the_fit_reads_every_row_and_prints_the_slope(shared: Path) -> None:
    output = _run("fit.py", "--prompts", "20", "40", "--samples=4", "--objectives=3", "--shuffled", shared=shared)
    assert re.findall(r"^ +(\d+) +(\d+) .* (?:read|exact) ", output, re.MULTILINE) == [
        (prompts, rows) for prompts, rows in (("20", "80"), ("40", "160")) for _ in ("read", "exact")
    ]
    assert re.search(r"^exact: log-log slope of time over prompts -?[\d.]+$", output, re.MULTILINE)
