"""What whole runs cost the processor, before and after a change: two commits, each with processes of its own.

    python benchmarks/processor_seconds.py --before COMMIT [--rows quickstart run] [--model SMOLLM2] [--rounds 1]

    quickstart  `mpo-ray run configs/quickstart.yaml`
    run         three objectives with LoRA policies on the model that `shared/models/smollm2.py` makes: 96 pairs, 32
                prompts × 3 proposals × 2 samples, exact fit, evaluation with 64 prompts

Counts user and system time of every process of the command, from its start to its end, five times a second: what a
process uses between the last look and its end is lost, on both sides. Commits run by turns. A machine on which nothing
else runs is needed: processors that are shared do less in a second.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil
import yaml
from stage_costs import ProcessTree

ROWS = ("quickstart", "run")
INTERVAL_S = 0.2
NAMES = ("positive", "concise", "detailed")


def run_file(row: str, project: Path, model: str | None, directory: Path) -> Path:
    """The run file of a row, the same for both commits."""
    if row == "quickstart":
        return project / "configs" / "quickstart.yaml"
    if model is None:
        raise SystemExit("--rows run needs --model, the directory of a chat model")
    config = {
        "name": "real-size",
        "reference": {"model": str(Path(model).absolute())},
        "objectives": {name: {"preferences": {"embedded": "pairs"}} for name in NAMES},
        "data": {"max_pairs": 96, "max_prompt_tokens": 64, "max_response_tokens": 96},
        "policies": {"batch_size": 16, "micro_batch_size": 8, "learning_rate": 1e-4, "lora": {"rank": 16}},
        "scoring": {"num_actors": 1, "batch_size": 16},
        "samples": {"num_prompts": 32, "proposals": "policies", "samples_per_prompt": 2, "max_new_tokens": 32},
        "fit": {"method": "exact", "estimator": "balanced"},
        "evaluation": {"prompts": {"embedded": "prompts"}, "num_prompts": 64, "max_new_tokens": 32},
    }
    path = directory / "real-size.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def cost_of(root: Path, config: Path, storage: Path) -> tuple[float, float]:
    """(processor-seconds, seconds) of a whole run by the code of one commit."""
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mpo_ray", "run", str(config), "--set", f"storage={storage}"]
    begin = time.perf_counter()
    with (storage.parent / f"{storage.name}.log").open("wb") as log:
        child = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT)
        tree, used = ProcessTree(psutil.Process(child.pid)), 0.0
        while child.poll() is None:
            used = tree.processor_seconds()
            time.sleep(INTERVAL_S)
    if child.returncode:
        raise SystemExit(f"{root} ended with {child.returncode}:\n{Path(log.name).read_text(errors='replace')[-3000:]}")
    return used, time.perf_counter() - begin


def compare(row: str, roots: dict[str, Path], config: Path, directory: Path, rounds: int) -> None:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in roots}
    for number in range(rounds):
        for name, root in roots.items():
            cost = cost_of(root, config, directory / f"{row}-{name}-{number}")
            found[name].append(cost)
            print(f"{row:11} {name:7} {cost[0]:8.1f} processor-seconds {cost[1]:8.1f} s", flush=True)
    if len(roots) == 2:
        processor, wall = (
            median(after[i] / before[i] for before, after in zip(found["before"], found["after"], strict=True))
            for i in (0, 1)
        )
        print(f"{row:11} after/before: processor-seconds {processor:.2f}, seconds {wall:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="COMMIT", help="if absent, this commit alone is measured")
    parser.add_argument("--model", help="directory of the chat model, for `run`")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    project = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory(prefix="processor-seconds-") as name:
        directory = Path(name)
        roots = {"after": project}
        git = ["git", "-C", str(project), "worktree"]
        if options.before:
            roots = {"before": directory / "before", **roots}
            subprocess.run([*git, "add", "--quiet", "--detach", str(roots["before"]), options.before], check=True)
        try:
            for row in options.rows:
                config = run_file(row, project, options.model, directory)
                compare(row, roots, config, directory, options.rounds)
        finally:
            if options.before:
                subprocess.run([*git, "remove", "--force", str(roots["before"])], check=True)


if __name__ == "__main__":
    main()
