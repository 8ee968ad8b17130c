"""A small run, broken off again and again: python benchmarks/kill_matrix.py [--kills 20] [--seed 0] [--out DIR]

An unbroken run comes first. Then the same run file, under another storage, has its processes sent SIGINT, SIGTERM or
SIGKILL at random moments of every stage: the command itself, a worker of Ray, or the raylet. Where the command ends, it
is started again. After each kill everything that the manifest calls complete is compared with the unbroken run, and at
the end λ, the models' tensors, every table and the completions are.

Prints a line per kill and, last, how many were repaired. Only processes that this script started get a signal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from mpo_ray.stages.pipeline import ORDER

ROOT = Path(__file__).parents[1]
SMALL = (
    "embedded.num_texts=200",
    "embedded.num_pairs=200",
    "embedded.num_prompts=16",
    "objectives={positive: {preferences: {embedded: pairs}, reward: 'mpo_ray.data.embedded:positive'}, "
    "concise: {preferences: {embedded: pairs}, reward: 'mpo_ray.data.embedded:concise'}}",
    "reference.sft.epochs=2",
    "reference.sft.checkpoint_every=2",
    "policies.epochs=2",
    "policies.checkpoint_every=2",
    "policies.batch_size=32",
    "policies.micro_batch_size=32",
    "samples.num_prompts=12",
    "samples.samples_per_prompt=4",
    "samples.max_new_tokens=24",
    "scoring.prompts_per_part=2",
    "fit.decoded.steps=2",
    "fit.decoded.num_prompts=8",
    "fit.bootstrap_draws=20",
    "evaluation.num_prompts=12",
    "evaluation.completions_per_prompt=1",
    "evaluation.max_new_tokens=24",
    "evaluation.bootstrap_draws=100",
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
VICTIMS = ("driver", "worker", "raylet")
#: Seconds within which a command that got a signal has to end, or to say something.
PATIENCE_S = 240.0
#: Seconds within which the processes of a command that was killed have to end: two agents of Ray 2.60 try for a minute
#: to tell the head that its raylet has died, though the head is dead as well.
LINGER_S = 120.0
#: How often a command is started that ends before its kill: Ray gives up a start that takes 30 s on a busy machine.
STARTS = 3


@dataclass
class Kill:
    stage: str
    share: float
    sent: signal.Signals
    victim: str
    outcome: str = ""
    problems: str = ""


class Command:
    """`mpo-ray run` as a process, with what it says on standard error as it says it.

    began: when it said so of a stage, by its title
    """

    def __init__(self, storage: Path) -> None:
        given = [part for item in (*SMALL, f"storage={storage}", "name=run") for part in ("--set", item)]
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {
            "RAY_AUTH_MODE": "disabled",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "RAY_worker_niceness": "0",
            "HF_HUB_OFFLINE": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mpo_ray", "run", str(ROOT / "configs" / "quickstart.yaml"), *given, "--json"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.said: list[str] = []
        self.began: dict[str, float] = {}
        self._lines: queue.Queue[tuple[float, str]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.put((time.monotonic(), line.strip()))

    def hear(self) -> bool:
        """Take what was said since the last call; whether there was anything."""
        before = len(self.said)
        while not self._lines.empty():
            moment, line = self._lines.get()
            self.said.append(line)
            self.began.setdefault(line.partition(": complete")[0], moment)
        return len(self.said) > before

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def tree(self) -> list[psutil.Process]:
        """The processes that it started, and theirs."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def victim(self, kind: str, rng: random.Random) -> psutil.Process:
        """One process of a kind; the command itself where it has none of that kind now."""
        found = []
        for process in self.tree():
            try:
                title, name = " ".join(process.cmdline()[:1]), process.name()
            except psutil.Error:
                continue
            if (kind == "raylet" and name == "raylet") or (kind == "worker" and title.startswith("ray::")):
                found.append(process)
        busy = [p for p in found if kind == "raylet" or "IDLE" not in p.cmdline()[0]]
        return rng.choice(busy or found or [psutil.Process(self.process.pid)])


def plan(kills: int, rng: random.Random, stages: list[str]) -> list[Kill]:
    """Every stage alike, in their order; every signal to every kind of process about as often.

    Within a stage first what ends the command: it comes back to the stage, and one that goes on does not.
    """
    pairs = [(sent, victim) for sent in SIGNALS for victim in VICTIMS]
    drawn: list[tuple[signal.Signals, str]] = []
    while len(drawn) < kills:
        drawn += rng.sample(pairs, len(pairs))
    places = sorted(rng.sample(stages * (kills // len(stages) + 1), kills), key=stages.index)
    planned = [Kill(stage, rng.random(), *pair) for stage, pair in zip(places, drawn, strict=False)]
    survived = {"driver": 0, "raylet": 1, "worker": 2}
    return sorted(planned, key=lambda kill: (stages.index(kill.stage), survived[kill.victim]))


def rewind(run: Path, stages: list[str]) -> None:
    """Take these stages from the run, with all that they and their workers left."""
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"] = {name: stage for name, stage in manifest["stages"].items() if name not in stages}
    kept = {node for stage in manifest["stages"].values() for node in stage["files"]}
    for path in [path for path in run.rglob("*") if path.is_file()]:
        node = path.relative_to(run).as_posix()
        if node not in kept and node not in ("manifest.json", "config.yaml"):
            path.unlink()
    for path in sorted((path for path in run.rglob("*") if path.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    (run / "manifest.json").write_text(json.dumps(manifest, indent=2))


def differences(run: Path, unbroken: Path, *, whole: bool) -> Iterator[str]:
    """What of the stages that the manifest of `run` calls complete is not what the unbroken run has.

    whole: that it is complete, and that nothing half written is left
    """
    try:
        stages = json.loads((run / "manifest.json").read_text())["stages"]
    except FileNotFoundError:
        stages = {}
    expected = json.loads((unbroken / "manifest.json").read_text())["stages"]
    nodes = {node for name in stages for node in expected[name]["files"]}
    for node in sorted(nodes):
        if not (run / node).exists():
            yield f"{node} is missing"
        elif node.endswith(".parquet"):
            if not pq.read_table(run / node).equals(pq.read_table(unbroken / node)):
                yield f"{node} has other rows"
        elif node.endswith(".safetensors"):
            mine, theirs = load_file(run / node), load_file(unbroken / node)
            if mine.keys() != theirs.keys() or not all(torch.equal(mine[name], theirs[name]) for name in mine):
                yield f"{node} has other tensors"
        elif node in ("fit.json", "trade_off.json", "evaluation/metrics.json"):
            mine, theirs = (json.loads((place / node).read_text()) for place in (run, unbroken))
            if mine != theirs:
                yield f"{node} differs in {sorted(key for key in theirs if mine.get(key) != theirs[key])}"
    if whole:
        if missing := expected.keys() - stages.keys():
            yield f"stages {sorted(missing)} are not complete"
        left = [str(path.relative_to(run)) for path in run.rglob(".partial-*")]
        left += [name for name in ("lock.json", ".storage-check") if (run / name).exists()]
        if left:
            yield f"left behind: {left}"


def wait_for(command: Command, kill: Kill, title: str, seconds: float) -> None:
    """Return at the moment of the kill, or when the command has ended."""
    stopped = time.monotonic() + PATIENCE_S
    while not command.ended and title not in command.began:
        if command.hear():
            stopped = time.monotonic() + PATIENCE_S
        if time.monotonic() > stopped:
            raise TimeoutError(f"the command said nothing for {PATIENCE_S:.0f} s; last {command.said[-3:]}")
        time.sleep(0.02)
    moment = command.began.get(title, 0.0) + kill.share * max(seconds, 0.5)
    while not command.ended and time.monotonic() < moment:
        time.sleep(0.02)
        command.hear()


def strike(command: Command, kill: Kill, rng: random.Random) -> None:
    """Send the signal, and see what becomes of the command and its processes."""
    tree, victim = command.tree(), command.victim(kill.victim, rng)
    is_driver = victim.pid == command.process.pid
    started = time.monotonic()
    os.kill(victim.pid, kill.sent)
    while not command.ended and time.monotonic() - started < PATIENCE_S:
        if command.hear() and not is_driver and time.monotonic() - started > 2.0:
            break  # it goes on
        time.sleep(0.02)
    elapsed = time.monotonic() - started
    if command.ended:
        _, alive = psutil.wait_procs(tree, timeout=LINGER_S)
        kill.outcome = f"ended with {command.process.returncode} after {elapsed:.1f} s"
        if alive:
            kill.problems += f"{len(alive)} processes outlived it by {LINGER_S:.0f} s: {alive}. "
            for process in alive:
                process.kill()
    elif elapsed >= PATIENCE_S:
        kill.outcome, kill.problems = "hung", f"it neither ended nor said anything for {PATIENCE_S:.0f} s. "
        for process in [*command.tree(), psutil.Process(command.process.pid)]:
            process.kill()
        command.process.wait()
    else:
        kill.outcome = "went on"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the runs lie; a finished unbroken one there is used again")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="kill-matrix-"))
    unbroken, broken = out / "unbroken" / "run", out / f"broken-{options.seed}" / "run"
    started = time.monotonic()
    for _ in range(STARTS):
        if "report" not in _seconds(unbroken):
            command = Command(unbroken.parent)
            command.process.wait()
    if "report" not in _seconds(unbroken):
        time.sleep(1.0)
        command.hear()
        print("\n".join(["the unbroken run did not come to its end:", *command.said]), file=sys.stderr)
        return 1
    seconds = _seconds(unbroken)
    print(f"unbroken: {sum(seconds.values()):.0f} s of work in {len(seconds)} stages", flush=True)
    titles = {stage.name: stage.title for stage in ORDER}
    rng = random.Random(options.seed)
    stages = [stage.name for stage in ORDER if stage.name in seconds]
    kills = plan(options.kills, rng, stages)
    command = Command(broken.parent)
    for number, kill in enumerate(kills, start=1):
        if kill.stage in _seconds(broken):
            if not command.ended:
                status = command.process.wait()
                kill.problems += "".join(f"before it: {found}. " for found in differences(broken, unbroken, whole=True))
                kill.problems += f"the command before it ended with {status}. " if status else ""
            rewind(broken, stages[stages.index(kill.stage) :])
        try:
            for _ in range(STARTS):
                if command.ended:
                    command = Command(broken.parent)
                wait_for(command, kill, titles[kill.stage], seconds[kill.stage])
                if not command.ended:
                    break
            if command.ended:
                command.hear()
                kill.problems += f"the command ended before its kill: {command.said[-3:]}"
            else:
                strike(command, kill, rng)
        except TimeoutError as error:
            kill.problems += str(error)
        kill.problems += "; ".join(differences(broken, unbroken, whole=False))
        print(
            f"{number:2d}  {kill.stage:<12} {kill.sent.name:<8} {kill.victim:<7} {kill.outcome:<32} "
            f"{kill.problems or 'what is complete equals the unbroken run'}",
            flush=True,
        )
    status = command.process.wait() if not command.ended else None
    if status != 0:
        status = Command(broken.parent).process.wait()
    last = [*differences(broken, unbroken, whole=True), *([f"the last command ended with {status}"] if status else [])]
    print(f"at the end: {'; '.join(last) or 'λ, tensors, tables and completions equal the unbroken run'}")
    repaired = 0 if last else sum(not kill.problems for kill in kills)
    print(f"{repaired} of {len(kills)} in {time.monotonic() - started:.0f} s on {_processor()}, {os.cpu_count()} cores")
    return int(repaired < len(kills))


def _seconds(run: Path) -> dict[str, float]:
    """Seconds of every complete stage."""
    path = run / "manifest.json"
    stages = json.loads(path.read_text())["stages"] if path.exists() else {}
    return {name: float(stage["seconds"]) for name, stage in stages.items()}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
