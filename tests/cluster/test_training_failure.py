"""A training that fails is told at once, in a sentence; what it held is free, and the others go on."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from rich.console import Console

from mpo_ray.cluster import training_group
from mpo_ray.cluster.train import TrainingError, train_all
from mpo_ray.cluster.training_failure import OPENING, READING, reason, remedy
from tests.cluster.small_trainings import NUM_TEXTS, small_job, small_run
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.tiny_run import ROOT

#: Of what a worker may take beyond its start, in bytes; the logits of one pass of `greedy` are more.
ROOM = 600 * 2**20
VOCABULARY = 200_000


def _on_worker(values: dict[str, Any]) -> None:
    """By the name of the job: run out of memory for real, be killed, or end after the others have failed."""
    from mpo_ray.cluster.train_worker import train_on_worker

    name = ray.get(values["board"].take.remote(values["group"], values["kind"]))
    root = Path(values["jobs"][name]["run_root"])
    if name == "greedy":
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "patient":
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (
            len(list(root.glob("training/*/error.txt"))) < 2 or ray.available_resources().get("CPU") != 3
        ):
            time.sleep(0.2)
        (root / "free.json").write_text(json.dumps(ray.available_resources().get("CPU")))
    train_on_worker(values)


@pytest.mark.slow
def test_trainings_that_fail_are_told_at_once_and_the_others_go_on(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One meets a real limit of its memory, one is killed by signal 9, one waits for the others' CPUs to be free."""
    root = small_run(tmp_path)
    tiny_llama(root / "large", tiny_tokenizer(), seed=0, vocab_size=VOCABULARY)
    texts = [{"prompt_ids": [1, 7 + i], "response_ids": [8] * 50 + [2]} for i in range(NUM_TEXTS)]
    pq.write_table(pa.Table.from_pylist(texts), root / "texts" / "long-00000.parquet")
    greedy = small_job(root, "greedy", batch_size=12, micro_batch_size=12).model_copy(
        update={"model": str(root / "large"), "train_parts": ["texts/long-00000.parquet"], "section": "reference.sft"}
    )
    monkeypatch.setattr(training_group, "train_on_worker", _on_worker)
    with pytest.raises(TrainingError) as raised:
        train_all([greedy, small_job(root, "killed"), small_job(root, "patient")], Console())

    told = capsys.readouterr()
    told_at = {name: (told.out + told.err).find(f"  {name} failed, and ") for name in ("greedy", "killed")}
    assert min(told_at.values()) >= 0, told.out + told.err
    assert json.loads((root / "free.json").read_text()) == 3  # the patient one was at work when they were told
    assert (root / "policies" / "patient" / "training.json").is_file()

    lines = str(raised.value).splitlines()
    assert len(lines) == 3, raised.value
    [out_of_memory] = [line for line in lines if line.startswith("  greedy: ")]
    assert re.search(
        r"out of memory at (its first step|step \d): \d+\.\d\d [MG]iB of memory could not be had\. Lower "
        r"reference\.sft\.micro_batch_size \(now 12\), or set reference\.sft\.gradient_checkpointing: true, or ",
        out_of_memory,
    ), out_of_memory
    [killed] = [line for line in lines if line.startswith("  killed: ")]
    assert "a worker ended without an error of its own. It was killed, as the kernel does by signal 9" in killed
    for line in (out_of_memory, killed):
        log = Path(line.partition("(all of it: ")[2].rstrip(")"))
        assert len(log.read_text().splitlines()) > 3
    assert "Traceback" in next(root.glob("training/greedy-*/error.txt")).read_text()


class _WorkersError(Exception):
    """What Ray Train raises, as far as it is read."""

    def __init__(self, *failures: Exception) -> None:
        super().__init__("Training failed due to worker errors")
        self.worker_failures = dict(enumerate(failures))


def test_of_several_workers_the_one_that_lacked_memory_is_the_cause(tmp_path: Path) -> None:
    """The others see only that it is gone."""
    job = small_job(tmp_path, "a")
    sentence = "out of memory at step 3: 2.00 GiB of GPU memory could not be had. Lower policies.micro_batch_size."
    error = _WorkersError(
        RuntimeError("Connection closed by peer"),
        RuntimeError(
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\n\n"
            f"mpo_ray.out_of_memory.OutOfMemoryError: {sentence}"
        ),
    )
    assert reason(job, error) == sentence
    assert reason(job, _WorkersError(RuntimeError("Traceback\nKeyError: 'x'"))) == "KeyError: 'x'"


def test_the_remedy_names_what_is_not_as_low_as_it_can_be(tmp_path: Path) -> None:
    least = {"batch_size": 1, "micro_batch_size": 1, "gradient_checkpointing": True, "precision": "bf16"}
    large, small = small_job(tmp_path, "a"), small_job(tmp_path, "a", **least)
    assert "policies.micro_batch_size (now 4)" in remedy(large, "at step 1")
    assert "gradient_checkpointing: true" in remedy(large, "at step 1")
    assert "micro_batch_size" not in remedy(small, "at step 1") + remedy(large, OPENING)
    assert remedy(large, OPENING).startswith("Set policies.precision: bf16")
    assert "precision" not in remedy(small, OPENING)
    assert "data.max_pairs" in remedy(large, READING)


#: Ray with a memory monitor that finds every machine too full, and a worker that it therefore ends.
MONITORED = """
import sys, time
from pathlib import Path
import ray
from mpo_ray.cluster.training_failure import reason
from tests.cluster.small_trainings import small_job

settings = {"memory_usage_threshold": 0.01, "memory_monitor_refresh_ms": 100}
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _system_config=settings)
worker = ray.remote(max_restarts=0)(type("Worker", (), {"work": lambda self: time.sleep(60)})).remote()
try:
    ray.get(worker.work.remote())
except Exception as error:
    print(reason(small_job(Path(sys.argv[1]), "a"), error))
"""


@pytest.mark.slow
def test_a_worker_that_rays_memory_monitor_ended_is_told_with_the_nodes_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MONITORED, str(tmp_path)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert re.fullmatch(
        r"out of memory: Ray's memory monitor ended a worker when its node had [\d.]+GB used / [\d.]+GB limit\. "
        r"Lower policies\.micro_batch_size \(now 4\), or .*\n",
        done.stdout,
    ), done.stdout + done.stderr
