"""The quickstart, as small as it goes: the overrides, and the command that a user types, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "quickstart.yaml"
OVERRIDES = (
    "embedded.num_texts=400",
    "embedded.num_pairs=300",
    "embedded.num_prompts=24",
    "reference.sft.epochs=1",
    "policies.epochs=2",
    "policies.checkpoint_every=3",
    "policies.batch_size=32",
    "policies.micro_batch_size=32",
    "samples.num_prompts=16",
    "samples.proposals=all",
    "samples.samples_per_prompt=4",
    "samples.max_new_tokens=32",
    "scoring.prompts_per_part=2",
    "fit.decoded.steps=2",
    "fit.decoded.num_prompts=8",
    "fit.bootstrap_draws=20",
    "evaluation.num_prompts=16",
    "evaluation.completions_per_prompt=1",
    "evaluation.max_new_tokens=32",
    "evaluation.bootstrap_draws=100",
    "evaluation.soups=true",
)


def overrides(storage: Path, name: str) -> list[str]:
    return [*OVERRIDES, f"storage={storage}", f"name={name}"]


def arguments(verb: str, storage: Path, name: str, *extra: str) -> list[str]:
    """What follows `mpo-ray`: VERB configs/quickstart.yaml with the small overrides."""
    given = [argument for item in overrides(storage, name) for argument in ("--set", item)]
    return [verb, str(CONFIG), *given, *extra]


def command(verb: str, storage: Path, name: str, *extra: str) -> list[str]:
    """`mpo-ray` with these arguments, as a process."""
    return [sys.executable, "-m", "tests.command", *arguments(verb, storage, name, *extra)]


def without(finished: Path, storage: Path, policy: str, *, scored: bool) -> Path:
    """A copy of a finished run that lacks one of its policies, and all that came after the scores.

    scored: whether the samples and scores that came of the policy are kept; what a policy that is trained again from
        the same inputs draws is then taken from there
    No stage is recorded, so each looks for what is there from the same inputs.
    """
    run = storage / finished.name
    shutil.copytree(finished, run)
    trained = [f"policies/{policy}", f"training/{policy}*", f"tensorboard/{policy}*"]
    drawn = [] if scored else [f"samples/{policy}*", "scores"]
    later = ["fit", "fit.json", "trade_off.json", "mixture", "evaluation", "report", "manifest.json"]
    for path in [path for node in (*trained, *drawn, *later) for path in run.glob(node)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return run


def environment() -> dict[str, str]:
    """A user's environment with this virtual environment active, without a Ray that another test has announced."""
    kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"}


def run(given: Sequence[str]) -> Any:
    """Run to the end and return what `--json` printed; a failure shows the command's own output."""
    done = subprocess.run(given, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
