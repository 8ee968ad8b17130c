"""Scoring outlives its processes: an actor that is killed costs one part, a driver that is killed costs a start."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from mpo_ray.cluster.score import Sampler, SampleScorer
from mpo_ray.run import Run
from tests.cluster.killed_scoring import ACTORS, arguments
from tests.tiny import tiny_llama, tiny_lora, tiny_tokenizer
from tests.tiny_run import ROOT, environment

NUM_PARTS = 8
#: Says which process scores which part, then takes its time.
SLOW_REWARD = """
import os, time

def reward(prompts, responses):
    with open({calls!r}, "a") as file:
        file.write(f"{{os.getpid()}} {{prompts[0]}}\\n")
    time.sleep(float(os.environ.get("PAUSE", "0")))
    return [float(len(response)) for response in responses]
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with a reference, a policy, and samples in eight files."""
    run = Run(str(tmp_path), "killed")
    run.write_text("config.yaml", "{}")
    base = tiny_llama(run.local / "base", tiny_tokenizer(), seed=0)
    tiny_lora(run.local / "policies" / "a", base, seed=1)
    run.write_text("slow.py", SLOW_REWARD.format(calls=str(run.local / "calls")))
    sampler = Sampler(str(base), {}, ACTORS.model_dump(), {}, num_samples=4, max_new_tokens=8)
    for index in range(NUM_PARTS):
        prompts = pa.table({"prompt_id": [str(index)], "prompt": [f"film {index}"], "is_chat": [False]})
        samples = sampler(prompts, {"proposal": "reference", "first_id": 0, "seed": index})
        run.write_table(f"samples/part-{index}.parquet", samples, inputs=str(index))
    return run


@pytest.mark.slow
@pytest.mark.usefixtures("cheap_workers")
def test_scoring_goes_on_when_an_actor_is_killed_and_resumes_when_the_driver_is(run: Run) -> None:
    """SIGKILL an actor at work, then the driver, then run again: the table of one call of the scorer, to the bit."""

    def calls() -> list[tuple[int, int]]:
        """(process, part) of every call of the reward."""
        lines = (run.read_text("calls") or "").splitlines()
        return [(int(line.split()[0]), int(line.split()[-1])) for line in lines]

    def at_work() -> bool:
        return not run.exists(f"scores/part-{calls()[-1][1]}.parquet")

    driver = _start(run)
    try:
        _wait_until(lambda: len(run.parts("scores")) >= 2 and at_work(), driver, run)
        actor, victim = calls()[-1]
        os.kill(actor, signal.SIGKILL)
        _wait_until(lambda: len(run.parts("scores")) >= 5 and at_work(), driver, run)
        second_actor, in_flight = calls()[-1]
    finally:
        driver.kill()
        driver.wait()
    assert second_actor != actor
    finished = {node: (run.local / node).stat().st_mtime_ns for node in run.parts("scores")}
    assert 5 <= len(finished) < NUM_PARTS

    driver = _start(run)
    assert driver.wait(timeout=600) == 0, run.read_text("driver.log")
    assert all((run.local / node).stat().st_mtime_ns == written for node, written in finished.items())
    assert len(run.parts("scores")) == NUM_PARTS
    made = Counter(part for _, part in calls())
    assert {part for part, times in made.items() if times > 1} <= {victim, in_flight}

    scorer = SampleScorer(**arguments(run))
    for node in run.parts("samples"):
        scored = run.read_table(node.replace("samples", "scores"))
        assert scored.equals(scorer(run.read_table(node), {}).select(scored.column_names))


def _start(run: Run) -> "subprocess.Popen[bytes]":
    with (run.local / "driver.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.killed_scoring", run.root],
            stdout=log,
            stderr=log,
            env={**environment(), "PAUSE": "0.5"},
            cwd=ROOT,
        )


def _wait_until(moment: Callable[[], bool], driver: "subprocess.Popen[bytes]", run: Run) -> None:
    deadline = time.monotonic() + 600
    while not moment():
        assert driver.poll() is None, run.read_text("driver.log")
        assert time.monotonic() < deadline, run.read_text("driver.log")
        time.sleep(0.02)
