"""A program for `test_constrained_task.py`: one of two DeepSpeed workers that train MOPO, with or without a checkpoint.

It ends without cleaning up, as a worker that is killed does.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mpo_ray.cluster.checkpoints import TAG
from mpo_ray.cluster.constrained_task import ConstrainedTask
from mpo_ray.cluster.deepspeed_engine import DeepSpeedEngine, prepare_sharded_loading
from mpo_ray.cluster.trainable import KeptBase
from mpo_ray.config_training import ConstrainedTraining
from mpo_ray.training.constrained import Problem
from mpo_ray.training.lagged import LaggedModel
from mpo_ray.training.loop import train
from tests.training.candidates import PROBLEM, candidates

STEPS, SAVED, WORLD = 5, 3, 2
TRAIN, HELDOUT = candidates(10, seed=5), candidates(3, seed=6)
LORA = {"rank": 4, "alpha": 16.0}
#: ZeRO stage, adapters, lag, and whether the run is broken after `SAVED` steps. In `policy`, λ answers the policy.
CASES: dict[str, tuple[int, dict[str, Any] | None, int, bool]] = {
    "lora-1": (1, LORA, 1, False),
    "lora-2": (2, LORA, 2, False),
    "lora-3": (3, LORA, 1, True),
    "full-0": (0, None, 1, False),
    "full-3": (3, None, 1, True),
    "policy": (1, LORA, 2, True),
}


def training_of(case: str) -> ConstrainedTraining:
    stage, lora, lag, _ = CASES[case]
    return ConstrainedTraining.model_validate(
        {
            "method": "online",
            "values_of": "policy" if case == "policy" else "ratio",
            "batch_size": 4,
            "micro_batch_size": 1,
            "learning_rate": 0.003,
            "warmup_share": 0.0,
            "zero_stage": stage,
            "lora": lora,
            "multiplier_step": 2.0,
            "chi_step": 0.1,
            "lag": lag,
            "relaxation": 0.95,
            "least_effective_share": 0.0,
            "workers": {"num_workers": WORLD},
        }
    )


def problem_of(case: str) -> Problem:
    """With the robust bound where the run is broken, so that χ is restored as well."""
    return Problem.model_validate({**PROBLEM.model_dump(), "radius": 0.01 if CASES[case][3] else 0.0})


def run_case(case: str, base: str, out: Path, *, resumed: bool) -> None:
    training, rank = training_of(case), dist.get_rank()
    sharded = prepare_sharded_loading(training, world_size=WORLD)
    model = KeptBase().completion_model(base, training, seed=0)
    del sharded
    engine = DeepSpeedEngine(model, training, total_steps=STEPS, device=torch.device("cpu"))
    task = ConstrainedTask(training, problem_of(case), TRAIN, HELDOUT, pad_id=0)
    task.begin(engine)
    start, checkpoint = 0, out / f"{case}-checkpoint"
    if resumed:
        start = engine.load(checkpoint)
        task.load(checkpoint / TAG)
    losses, states = [], []
    for step, loss in train(
        engine,
        task.loss,
        lengths=task.lengths,
        units=task.units,
        batch_size=training.batch_size,
        micro_batch_size=training.micro_batch_size,
        start_step=start,
        total_steps=STEPS,
        seed=0,
    ):
        task.stepped(step)
        losses.append(float(engine.mean(torch.tensor(loss, dtype=torch.float64))))
        states.append(task.state.as_json())
        if step == SAVED and CASES[case][3] and not resumed:
            save(engine, task, checkpoint)
    found: dict[str, Any] = {"losses": losses, "states": states, "heldout": task.evaluate()}
    assert isinstance(engine.wrapped, LaggedModel)
    for name, trained, lagged in engine.wrapped.lagged_pairs():
        for kind, parameter in (("trained", trained), ("lagged", lagged)):
            with engine.gathered(parameter):
                found[f"{kind} {name}"] = parameter.detach().clone()
    if rank == 0:
        exported = engine.full_state(trained_only=training.lora is not None)
        found["exported"] = sorted(exported)
    else:
        engine.full_state(trained_only=training.lora is not None)
    torch.save(found, out / f"{case}-{'resumed' if resumed else 'unbroken'}-{rank}.pt")


def save(engine: DeepSpeedEngine, task: ConstrainedTask, checkpoint: Path) -> None:
    """Every worker into a directory of its own, which Ray Train would merge."""
    mine = checkpoint.with_name(f"{checkpoint.name}-{engine.rank}")
    (mine / TAG).mkdir(parents=True)
    task.save(mine / TAG)
    engine.save(mine, step=SAVED)
    dist.barrier()
    if engine.rank == 0:
        for rank in range(WORLD):
            shutil.copytree(checkpoint.with_name(f"{checkpoint.name}-{rank}"), checkpoint, dirs_exist_ok=True)
    dist.barrier()


def main(base: str, out: Path, rank: int, cases: list[str], *, resumed: bool) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    store = out / f"store-{'resumed' if resumed else 'unbroken'}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    for case in cases:
        run_case(case, base, out, resumed=resumed)
    print(json.dumps(cases), flush=True)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[5]), resumed=sys.argv[4] == "resumed")
