"""MOPO through Ray Train: what a job leaves behind, and why one stops."""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from peft import PeftModel
from rich.console import Console
from tensorboardX.proto import event_pb2
from transformers import AutoModelForCausalLM

from mpo_ray.cluster.event_log import EventLog
from mpo_ray.cluster.train import TrainingError, train_all
from mpo_ray.cluster.training_job import TrainingJob
from mpo_ray.cluster.training_metrics import TrainingMetrics
from mpo_ray.config_training import ConstrainedTraining, PolicyTraining, Source, SupervisedTraining, Training
from mpo_ray.maths.constrained import ratio
from mpo_ray.run import Run
from mpo_ray.training.constrained import Candidates, pool_of
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.tiny_run import ROOT
from tests.training.candidates import PROBLEM, as_row, candidates, fixed_logprobs

SHARED = {
    "batch_size": 4,
    "micro_batch_size": 4,
    "learning_rate": 0.01,
    "epochs": 10,
    "checkpoint_every": 6,
    "lora": {"rank": 4},
    "workers": {"num_workers": 1, "max_failures": 1},
}
ONLINE = {**SHARED, "method": "online", "lag": 2, "zero_stage": 1}
OFFLINE = {**SHARED, "method": "offline", "least_effective_share": 0.99}
QUANTITIES = ("loss", "primary", "effective_share", "kl")
PER_OBJECTIVE = ("multiplier", "value", "bound", "slack")


def _job(name: str, root: Path, model: str, training: Training) -> TrainingJob:
    return TrainingJob(
        name=name,
        inputs="0" * 64,
        run_root=str(root),
        model=model,
        training=training,
        problem=PROBLEM,
        train_parts=["candidates/train-0.parquet"],
        heldout_parts=["candidates/heldout-0.parquet"],
        output=f"mopo/{name}/policy",
        seed=0,
    )


def test_a_job_that_has_travelled_is_of_the_kind_it_was(tmp_path: Path) -> None:
    kinds = (
        PolicyTraining(),
        ConstrainedTraining(),
        ConstrainedTraining.model_validate(ONLINE),
        SupervisedTraining(source=Source(embedded="corpus")),
    )
    for training in kinds:
        job = _job("a", tmp_path, "base", training)
        again = TrainingJob.model_validate(json.loads(json.dumps(job.model_dump(mode="json"))))
        assert again == job
        assert type(again.training) is type(training)


@pytest.mark.slow
def test_two_jobs_one_of_which_stops(ray_cluster: None, tmp_path: Path) -> None:
    """Online: a policy like any other, and a history. Offline, with a ratio more uneven than is asked for: why."""
    base = str(tiny_llama(tmp_path / "base", tiny_tokenizer(), seed=0))
    root = tmp_path / "run"
    (root / "candidates").mkdir(parents=True)
    (root / "config.yaml").write_text("{}")
    heldout = _write(root / "candidates" / "heldout-0.parquet", candidates(3, seed=6))
    _write(root / "candidates" / "train-0.parquet", candidates(8, seed=5))
    jobs = [
        _job(name, root, base, ConstrainedTraining.model_validate(values))
        for name, values in (("online", ONLINE), ("offline", OFFLINE))
    ]
    with pytest.raises(TrainingError, match=r"offline: step 1: ρ rests on \d\d\.\d% of its candidates") as raised:
        train_all(jobs, Console())
    assert "online" not in str(raised.value)
    assert not (root / "mopo" / "offline").exists()

    policy = root / "mopo" / "online" / "policy"
    assert not (policy / "lagged").exists()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), policy).eval()
    assert not any("lagged" in name for name, _ in model.named_parameters())

    record = json.loads((policy / "training.json").read_text())
    steps = [row for row in record["history"] if "loss" in row]
    wanted = [*QUANTITIES, *(f"{kind}_{name}" for kind in PER_OBJECTIVE for name in PROBLEM.secondary)]
    assert [row["step"] for row in steps] == [10, 20]
    assert all(set(wanted) | {"step"} == set(row) for row in steps)
    last = steps[-1]
    assert last["multiplier_harmless"] > steps[0]["multiplier_harmless"] > 0
    assert last["slack_concise"] == pytest.approx(last["value_concise"] - last["bound_concise"])
    assert [row["step"] for row in record["history"] if "heldout_primary" in row] == [6, 12, 18]

    reference = AutoModelForCausalLM.from_pretrained(base).eval()
    log_ratios = [fixed_logprobs(model, c) - fixed_logprobs(reference, c) for c in heldout]
    shares = np.exp(pool_of(heldout, np.concatenate(log_ratios)).log_reference)
    primary = shares @ np.concatenate([c.primary for c in heldout]) / len(heldout)
    assert record["heldout"]["primary"] == pytest.approx(primary, abs=1e-5)
    assert record["heldout"]["kl"] > 0.01

    shown = {(row["step"], name): row[name] for row in record["history"] for name in set(row) - {"step"}}
    assert _values(_events(root / "tensorboard" / "online")) == pytest.approx(shown, rel=1e-6)

    contents = [(policy / name).read_bytes() for name in ("adapter_model.safetensors", "training.json")]
    shutil.rmtree(policy)
    train_all(jobs[:1], Console())  # from the last checkpoint: weights, and the bounds that `slack` is over
    assert [(policy / name).read_bytes() for name in ("adapter_model.safetensors", "training.json")] == contents


def test_events_reach_storage_that_is_elsewhere_and_void_what_a_broken_run_had_seen() -> None:
    run = Run("memory://events", "far")
    shutil.rmtree(run.local, ignore_errors=True)
    log = EventLog(run, "dpo-good", start=7)
    log.add(10, {"loss": 0.5})
    log.add(20, {"loss": 0.25})
    log.close()
    events = _events(run.fetch("tensorboard/dpo-good"))
    assert [event.step for event in events if event.session_log.status == event_pb2.SessionLog.START] == [8]
    assert _values(events) == {(10, "loss"): 0.5, (20, "loss"): 0.25}


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_training_that_begins_anew_replaces_the_events_of_an_earlier_one(tmp_path: Path, elsewhere: bool) -> None:
    """Both would be drawn over each other. One that goes on leaves the file of what came before its checkpoint."""
    run = Run(f"memory://{tmp_path}" if elsewhere else str(tmp_path), "again")
    for start, loss in ((5, 0.75), (0, 0.5), (10, 0.25)):
        log = EventLog(run, "dpo-good", start=start)
        log.add(start + 10, {"loss": loss})
        log.close()
    assert _values(_events(run.fetch("tensorboard/dpo-good"))) == {(10, "loss"): 0.5, (20, "loss"): 0.25}
    assert len(list(run.fetch("tensorboard/dpo-good").iterdir())) == 2


@pytest.mark.slow
def test_figures_are_metrics_of_the_cluster_under_the_names_that_the_documentation_gives(
    ray_cluster: None, tmp_path: Path
) -> None:
    """A gauge per quantity at the node's metrics port, with the run, the training and the objective as tags."""
    metrics = TrainingMetrics(_job("constrained", tmp_path / "mine", "base", ConstrainedTraining()))
    expected = {
        r'ray_mpo_ray_training_loss\{.*objective="".*run="mine",training="constrained"\} 1\.5',
        r'ray_mpo_ray_training_multiplier\{.*objective="harmless".*run="mine",training="constrained"\} 0\.25',
    }
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    for _ in range(60):
        metrics.show({"loss": 1.5, "multiplier": {"harmless": 0.25}})
        time.sleep(1)
        with urllib.request.urlopen(address, timeout=10) as page:
            text = page.read().decode()
        if all(re.search(line, text) for line in expected):
            break
    else:
        pytest.fail("\n".join(line for line in text.splitlines() if "mpo_ray" in line))
    documented = set(re.findall(r"`mpo_ray_training_(\w+)`", (ROOT / "docs" / "mopo.md").read_text()))
    assert documented == {*QUANTITIES, *PER_OBJECTIVE, "chi"}


def _events(directory: Path) -> list[event_pb2.Event]:
    """The events of all files of a directory; a file is length, checksum, event, checksum, one after another."""
    found = []
    for path in directory.iterdir():
        content, place = path.read_bytes(), 0
        while place < len(content):
            size = int.from_bytes(content[place : place + 8], "little")
            found.append(event_pb2.Event.FromString(content[place + 12 : place + 12 + size]))
            place += size + 16
    return found


def _values(events: list[event_pb2.Event]) -> dict[tuple[int, str], float]:
    return {(event.step, value.tag): value.simple_value for event in events for value in event.summary.value}


def _write(path: Path, given: list[Candidates]) -> list[Candidates]:
    """Write the rows of a part; ρ at λ = 0."""
    pool = pool_of(given)
    rho = np.split(ratio(pool, np.zeros(2), PROBLEM.tau), pool.starts[1:-1])
    given = [replace(candidate, ratio=row) for candidate, row in zip(given, rho, strict=True)]
    pq.write_table(pa.Table.from_pylist([as_row(i, c) for i, c in enumerate(given)]), path)
    return given
