"""The whole path by its command: what it leaves, that it resumes, and that two runs agree."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mpo_ray  # noqa: F401 - registers the mixture
from mpo_ray.cli import main
from mpo_ray.run import Run
from tests import tiny_run

pytestmark = pytest.mark.slow


def _weights(run: Path) -> dict[str, float]:
    return json.loads((run / "fit.json").read_text())["weights"]


def test_a_run_leaves_every_node_of_the_design_and_what_it_was_made_from(finished_run: Path) -> None:
    for node in (
        "config.yaml",
        "comparisons/positive/train-00000.parquet",
        "base/model.safetensors",
        "policies/concise/adapter_model.safetensors",
        "samples/reference-part-00000.parquet",
        "samples/concise-part-00000.parquet",
        "scores/reference-part-00000.parquet",
        "mixture/fit.json",
        "evaluation/completions.parquet",
        "report/report.html",
    ):
        assert (finished_run / node).is_file(), node
    manifest = json.loads((finished_run / "manifest.json").read_text())
    assert set(manifest["stages"]) >= {"data", "reference", "policies", "samples", "scores", "fit", "evaluation"}
    assert manifest["versions"]["torch"] == torch.__version__
    assert not list(finished_run.glob(".partial-*"))
    assert not (finished_run / "training").exists(), "checkpoints are of no use to a policy that is recorded"


def test_the_score_table_is_the_contract_and_its_log_ratios_are_exact(finished_run: Path) -> None:
    """ℓ_k = log π_k − log π_ref of a row equals a plain forward pass of PEFT and the reference (design 5.2)."""
    table = pq.read_table(finished_run / "scores" / "detailed-part-00000.parquet")
    assert {"prompt_id", "sample_id", "log_ref", "proposal", "log_ratio_positive", "reward_concise"} <= set(
        table.column_names
    )
    reference = AutoModelForCausalLM.from_pretrained(finished_run / "base")
    adapted = AutoModelForCausalLM.from_pretrained(finished_run / "base")
    policy = PeftModel.from_pretrained(adapted, finished_run / "policies" / "concise").eval()

    def logprob(model: torch.nn.Module, prompt: list[int], response: list[int]) -> float:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
        return float(torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(response)[:, None]).sum())

    for row in table.slice(0, 4).to_pylist():
        log_ref = logprob(reference, row["prompt_ids"], row["response_ids"])
        log_policy = logprob(policy, row["prompt_ids"], row["response_ids"])
        assert row["log_ref"] == pytest.approx(log_ref, abs=1e-3)
        assert row["log_ratio_concise"] == pytest.approx(log_policy - log_ref, abs=1e-3)


def test_samples_end_with_the_end_token_or_at_the_limit(finished_run: Path) -> None:
    eos = AutoTokenizer.from_pretrained(finished_run / "base").eos_token_id
    rows = Run.at(str(finished_run)).read_table("samples").to_pylist()
    assert len(rows) == 4 * 16 * 4
    assert len({(row["prompt_id"], row["sample_id"]) for row in rows}) == len(rows)
    for row in rows:
        assert (row["response_ids"][-1] == eos) is row["finished"]
        assert row["finished"] or len(row["response_ids"]) == 32


def test_policies_learned_their_objectives(finished_run: Path) -> None:
    """Each policy's mean log-ratio is higher on chosen than on rejected responses of pairs it never saw."""
    for name in ("positive", "concise", "detailed"):
        record = json.loads((finished_run / "policies" / name / "training.json").read_text())
        assert record["heldout"]["loss"] < 0.6931
        assert record["heldout"]["margin"] > 0


@pytest.mark.usefixtures("ray_cluster")
def test_the_same_command_skips_everything_and_says_so(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished_run / "fit.json").stat().st_mtime_ns
    assert main(tiny_run.arguments("run", finished_run.parent, "unbroken")) == 0
    printed = capsys.readouterr()
    assert printed.err.count("complete, inputs unchanged; skipped") == 11
    assert (finished_run / "fit.json").stat().st_mtime_ns == before
    assert "MPO mixture" in printed.out
    assert printed.out.rstrip().endswith("report/report.html")


def test_another_config_under_the_same_name_is_refused_until_told_to_update(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tiny_run.arguments("fit", finished_run.parent, "unbroken", "--set", "fit.decoded.steps=3")
    assert main(given) == 1
    message = capsys.readouterr().err
    assert "belongs to another config: fit.decoded.steps is 2 there and 3 here" in message
    assert "--update" in message


@pytest.mark.usefixtures("ray_cluster")
def test_given_weights_are_taken_as_they_are(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MORLHF (Lemma 3.9): with λ given nothing is fitted, and only the stages after the scores are done again."""
    run = tmp_path / "unbroken"
    shutil.copytree(finished_run, run)
    given = "fit={method: fixed, weights: {positive: 0.2, concise: 0.5, detailed: 0.3}}"
    assert main(tiny_run.arguments("fit", tmp_path, "unbroken", "--set", given, "--update", "--json")) == 0
    notes = json.loads(capsys.readouterr().out.splitlines()[-1])["notes"]
    assert notes == {"positive": 0.2, "concise": 0.5, "detailed": 0.3}
    assert json.loads((run / "fit.json").read_text())["method"] == "fixed"


@pytest.mark.usefixtures("ray_cluster")
def test_a_stage_whose_inputs_are_missing_names_the_one_to_run_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_run.arguments("fit", tmp_path, "fresh")) == 1
    assert "'fit' needs 'embedded', which is not complete" in capsys.readouterr().err


def test_a_run_killed_in_training_and_evaluation_ends_with_the_weights_of_an_unbroken_one(
    finished_run: Path, tmp_path: Path
) -> None:
    """SIGKILL the driver twice; the third start finishes, and policy and λ are the same to the last bit.

    Kills in scoring and in the decoded fit have tests of their own, so samples and scores are the finished run's: a
    policy that is trained to the end from the same inputs has no others.
    """
    run = tiny_run.without(finished_run, tmp_path, "positive", scored=True)

    def in_training() -> bool:
        return (
            any(run.glob("training/positive-*/checkpoint_*/history.json"))
            and not (run / "policies" / "positive").exists()
        )

    def in_evaluation() -> bool:
        return 0 < len(list(run.glob("evaluation/parts/*.parquet"))) < 64

    for stage, moment in (("policies", in_training), ("evaluation", in_evaluation)):
        _kill_when(moment, tiny_run.command("run", tmp_path, run.name))
        assert stage not in json.loads((run / "manifest.json").read_text())["stages"]
    scored = {path: path.stat().st_mtime_ns for path in run.glob("scores/*.parquet")}
    assert len(scored) == 32
    evaluated = {path: path.stat().st_mtime_ns for path in run.glob("evaluation/parts/*.parquet")}
    result = tiny_run.run(tiny_run.command("run", tmp_path, run.name, "--json"))
    adapters = [load_file(r / "policies" / "positive" / "adapter_model.safetensors") for r in (run, finished_run)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
    assert result["weights"] == _weights(finished_run)
    assert _weights(run) == _weights(finished_run)
    completions = [pq.read_table(r / "evaluation" / "completions.parquet") for r in (run, finished_run)]
    assert completions[0].equals(completions[1])
    for path, written in (scored | evaluated).items():
        assert path.stat().st_mtime_ns == written, f"{path} was made again"


def _kill_when(moment: Callable[[], bool], arguments: list[str]) -> None:
    driver = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=tiny_run.environment(), cwd=tiny_run.ROOT
    )
    try:
        deadline = time.monotonic() + 300
        while not moment():
            assert driver.poll() is None, "the run ended before the moment came"
            assert time.monotonic() < deadline, "the moment never came"
            time.sleep(0.005)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
