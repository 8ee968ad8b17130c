"""The comparison with reinforcement learning runs, on next to nothing, on a run that the command has made."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from maxmin_rlhf import main


@pytest.mark.slow
def test_maxmin_rlhf_is_trained_and_judged_beside_the_candidates_of_the_run(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl", reason="trl is in the extra `bench`: pip install 'mpo_ray[bench]'")
    options = ("--steps=2", "--batch-size=8", "--group-size=4", "--reference-samples=8", "--max-new-tokens=8")
    assert main([f"--run={finished_run}", f"--out={tmp_path}", "--methods", "MaxMin-RLHF", *options]) == 0
    result = json.loads((tmp_path / "comparison.json").read_text())
    training = result["training"]["MaxMin-RLHF"]
    assert [row["step"] for row in training["curve"]] == [1, 2]
    assert all(row["maximised"] == min(row["rewards"], key=row["rewards"].get) for row in training["curve"][:1])
    # 8 reference completions and 2 updates of 8, of at most 8 tokens each
    assert 24 <= training["generated_tokens"] <= 3 * 8 * 8
    assert training["processor_seconds"] > 0
    own = json.loads((finished_run / "evaluation" / "metrics.json").read_text())
    candidates = result["metrics"]["candidates"]
    assert set(candidates) == {*own["candidates"], "MaxMin-RLHF"}
    for name, value in own["candidates"].items():
        assert candidates[name]["minimum_win_rate"]["value"] == value["minimum_win_rate"]["value"]
    costs = result["costs"]
    stages = json.loads((finished_run / "manifest.json").read_text())["stages"]
    given = sum(stages[name]["seconds"] for name in ("samples", "scores", "fit", "mixture"))
    assert costs["MPO, given its policies"]["seconds"] == pytest.approx(given)
    assert costs["MPO, given its policies"]["processor_seconds"] is None
    assert "not measured" in capsys.readouterr().out
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_without_a_run_the_comparison_says_how_to_make_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "python benchmarks/stage_costs.py configs/imdb.yaml" in capsys.readouterr().err


def test_a_run_that_is_not_finished_is_refused_by_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "name": tmp_path.name,
        "storage": str(tmp_path.parent),
        "reference": {"model": "embedded"},
        "objectives": {"a": {"preferences": {"embedded": "pairs"}}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main([f"--run={tmp_path}"]) == 1
    expected = f"{tmp_path} has no prompts/fit: it is not finished. `mpo-ray run CONFIG` goes on with it."
    assert expected in capsys.readouterr().err


def test_the_run_of_another_version_is_refused_by_the_key_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("name: old\nfit: {steps: 4000}\n")
    assert main([f"--run={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert "was written by another version of mpo_ray (" in error
    assert "Do the run anew." in error
