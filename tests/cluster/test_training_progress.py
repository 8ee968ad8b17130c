"""What a training says while it goes, where there is no terminal."""

from __future__ import annotations

import gc
import re
import threading
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from rich.console import Console

from mpo_ray.cluster.progress import Bars, described
from mpo_ray.cluster.train import train_all
from tests.cluster.small_trainings import small_job, small_run


def test_figures_are_told_in_words() -> None:
    figures = {"loss": 0.693147, "tokens_per_s": 1234.5, "seconds_left": 150.0}
    assert described(figures) == "loss 0.6931, 1,234 tokens/s, 2 min left"
    assert described({"seconds_left": 99.4}) == "99 s left"
    assert described({"seconds_left": 9000.0}) == "2.5 h left"


def test_a_note_is_told_once_and_only_if_it_stays(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = Bars(Console())
    for text in ("opening the model", "opening the model", "reading the data"):
        bars.note("a", text)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("mpo_ray.cluster.progress.SLOW_S", 0.0)
    for _ in range(3):
        bars.note("a", "reading the data")
    assert capsys.readouterr().err == "  a: reading the data\n"


@pytest.mark.slow
def test_a_training_says_what_it_waits_for_and_tells_of_its_first_step(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All CPUs belong to somebody else at first. Three steps, of which the old count of ten told only the last."""
    gc.collect()  # an actor of a test that failed on purpose has its CPU as long as an error refers to it
    held = placement_group([{"CPU": 1}] * int(ray.cluster_resources()["CPU"]))
    ray.get(held.ready())
    release = threading.Timer(15.0, remove_placement_group, [held])
    release.start()
    train_all([small_job(small_run(tmp_path), "a")], Console())
    release.join()
    told = capsys.readouterr().err
    assert re.search(r"^  a: waiting for 1 CPU \(0 of 4 free\)$", told, re.MULTILINE), told
    assert re.search(r"^  a: 1/3 loss \d\.\d+, [\d,]+ tokens/s, \d+ s left$", told, re.MULTILINE), told
    assert re.search(r"^  a: 3/3 loss .* 0 s left$", told, re.MULTILINE), told
