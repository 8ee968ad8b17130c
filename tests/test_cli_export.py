"""`export` of plain models, and `generate` for one prompt: what the command line prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpo_ray.cli import main
from tests.policies.material import WEIGHTS, make_material, write
from tests.tiny import WORDS


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("export")
    return str(write(make_material(root / "material"), root / "artefact", "lora"))


def _json(capsys: pytest.CaptureFixture[str], *given: str) -> Any:
    assert main([*given, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_prompt_s_completions_come_with_what_was_measured(artefact: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Sample i of n has the seed s + i; each mode says what it measures, and λ."""
    given = ["generate", artefact, "--prompt", "the film", "--max-tokens", "5", "--seed"]
    for more, measured in {
        (): {"log_z"},
        ("--method", "smc", "--particles", "4"): {"log_z", "log_z_hat", "effective_sample_size", "particles"},
        ("--method", "rejection"): {"log_z", "log_z_hat", "attempts"},
    }.items():
        three = _json(capsys, *given, "3", "--n", "3", *more)["completions"]
        last = _json(capsys, *given, "5", *more)["completions"]
        diagnostics = last[0].pop("diagnostics")
        other = three[2].pop("diagnostics")
        assert three[2] == last[0]
        assert other["log_z"] == pytest.approx(diagnostics["log_z"], abs=1e-4)
        assert diagnostics["weights"] == WEIGHTS
        assert {name for name, value in diagnostics.items() if value is not None} == {"mode", "weights", *measured}


def test_a_stop_string_ends_the_text(artefact: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["generate", artefact, "--prompt", "the film", "--max-tokens", "12", "--temperature", "0"]
    text = _json(capsys, *given)["text"]
    word = text.split()[2]
    assert _json(capsys, *given, "--stop", word)["text"] == text[: text.index(word)]


def test_the_soup_is_named_where_it_is_printed(
    artefact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", artefact, "--merge", "soup", "--out", str(tmp_path / "soup")]) == 0
    printed = capsys.readouterr().out
    assert "It is not the mixture" in printed
    assert printed.splitlines()[-1] == str(tmp_path / "soup")


def test_distillation_prints_what_remains(artefact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the reference, before training and after it, each with its interval, on a share of the file's prompts."""
    (tmp_path / "prompts.txt").write_text("".join(f"the {word}\n" for word in WORDS))
    given = ["--prompts", str(tmp_path / "prompts.txt"), "--heldout-share", "0.3", "--max-tokens", "4"]
    how = ["--steps", "30", "--rank", "8", "--learning-rate", "5e-3", "--batch-size", "8"]
    assert main(["export", artefact, "--distill", *given, *how, "--out", str(tmp_path / "student")]) == 0
    printed = capsys.readouterr()
    record = json.loads((tmp_path / "student" / "distillation.json").read_text())
    for key, name in {"reference": "the reference", "before": "the average", "after": "this policy"}.items():
        value, low, high = record[key]["per_token"]
        assert f"{value:.3g} [{low:.3g}, {high:.3g}]" in next(x for x in printed.out.splitlines() if name in x)
        assert low <= value <= high
    assert record["after"]["per_token"][0] < record["before"]["per_token"][0]
    assert "distillation: 30/30 loss" in printed.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--merge", "soup"], "--out DIR is missing"),
        (["--distill"], "--out DIR is missing"),
        (["--out", "x"], "--out goes with --merge or --distill"),
        (["--merge", "soup", "--out", "x", "--steps", "5"], "--steps goes with --distill"),
        (["--merge", "soup", "--out", "x", "--particles", "4"], "--particles goes with --distill"),
        (["--merge", "soup", "--out", "x", "--weights", "polite=1"], "unknown objective 'polite'"),
        (["--distill", "--out", "x"], "is an artefact without prompts"),
        (["--distill", "--out", "x", "--heldout-share", "0.2"], "--heldout-share goes with --prompts"),
        (["--distill", "--out", "x", "--prompts", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--distill", "--out", "x", "--prompts", "p.txt", "--heldout-share", "2"], "it lies between 0 and 1"),
        (["--distill", "--out", "x", "--seed", "-1"], "--seed -1"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    artefact: str, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    assert main(["export", artefact, *given]) == 1
    assert message in capsys.readouterr().err
    assert not Path("x").exists()


@pytest.mark.parametrize("given", [["--actors", "2"], ["--out", "x"], ["--jsonl"], ["--address", "auto"]])
def test_what_goes_with_a_file_of_prompts_is_refused_beside_one(
    artefact: str, capsys: pytest.CaptureFixture[str], given: list[str]
) -> None:
    assert main(["generate", artefact, "--prompt", "x", *given]) == 1
    assert f"{given[0]} goes with --prompts FILE" in capsys.readouterr().err
