"""The gradient of one step as training takes it, and a program that takes it on two DeepSpeed workers.

Everything is what a Ray Train worker uses: the job's parts, its task, the engine, the loop. Only the optimiser's step
is watched.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mpo_ray.cluster.constrained_task import ConstrainedTask
from mpo_ray.cluster.deepspeed_engine import DeepSpeedEngine
from mpo_ray.cluster.tasks import PreferenceTask, SupervisedTask, Task
from mpo_ray.cluster.trainable import KeptBase
from mpo_ray.cluster.training_job import TrainingJob
from mpo_ray.run import Run
from mpo_ray.training.loop import NonFiniteError, train
from tests.tiny import tiny_tokenizer
from tests.training.candidates import PROBLEM, as_row, candidates

BATCH, WORLD = 8, 2
#: Replies of 2 to 20 tokens: a mean of means of forward passes is far from the mean over all tokens.
LENGTHS = [2, 3, 2, 20, 4, 15, 2, 9]
KINDS: dict[str, dict[str, Any]] = {
    "sft": {"source": {"path": "unused.jsonl"}},
    "dpo": {"loss": "dpo", "lora": None},
    "ipo": {"loss": "ipo", "length_normalized": True, "lora": None},
    "mopo": {"method": "online", "lora": None, "lag": None},
}


def reply(number: int, shift: int) -> list[int]:
    return [*(7 + (3 * i + shift) % 16 for i in range(LENGTHS[number] - 1)), 2]


def write_parts(run: Run) -> None:
    """Eight rows for each kind of training: as many as a step takes, so that every one is in it."""
    texts = [{"prompt_ids": [1, 7 + n], "response_ids": reply(n, n)} for n in range(BATCH)]
    pairs = [
        {
            "id": f"p{n}",
            "prompt_ids": [1, 7 + n],
            "chosen_ids": reply(n, n),
            "rejected_ids": reply(BATCH - 1 - n, n + 5),
            "log_ref_chosen": -3.0 * LENGTHS[n],
            "log_ref_rejected": -3.0 * LENGTHS[BATCH - 1 - n] - n,
            "weight": 1.0 + n % 3,
        }
        for n in range(BATCH)
    ]
    prompts = [as_row(n, given) for n, given in enumerate(candidates(BATCH, seed=5))]
    for kind, rows in {"sft": texts, "dpo": pairs, "ipo": pairs, "mopo": prompts}.items():
        run.write_table(f"parts/{kind}.parquet", pa.Table.from_pylist(rows), inputs=kind)
    pairs[5]["log_ref_chosen"] = float("nan")
    run.write_table("parts/nan.parquet", pa.Table.from_pylist(pairs), inputs="nan")


def job_of(
    kind: str, run: Run, base: str, micro_batch_size: int, world_size: int, part: str = "", **changes: Any
) -> TrainingJob:
    sizes = {"batch_size": BATCH, "micro_batch_size": micro_batch_size, "workers": {"num_workers": world_size}}
    return TrainingJob.model_validate(
        {
            "name": kind,
            "inputs": "0" * 12,
            "run_root": run.root,
            "model": base,
            "training": {**sizes, "max_grad_norm": 1e9, "learning_rate": 1e-3, **KINDS[kind], **changes},
            "problem": PROBLEM.model_dump() if kind == "mopo" else None,
            "train_parts": [f"parts/{part or kind}.parquet"],
            "heldout_parts": [],
            "output": "out",
            "seed": 0,
        }
    )


def take_step(run: Run, job: TrainingJob) -> tuple[float, torch.Tensor]:
    """The loss of a step over all workers, and its gradient as the optimiser gets it (ZeRO 0, nothing clipped)."""
    engine = DeepSpeedEngine(
        KeptBase().completion_model(job.model, job.training, seed=0),
        job.training,
        total_steps=4,
        device=torch.device("cpu"),
    )
    kind = {"sft": SupervisedTask, "mopo": ConstrainedTask.of_job}.get(job.name, PreferenceTask)
    task: Task = kind(run, job, tiny_tokenizer())
    task.begin(engine)
    seen: list[torch.Tensor] = []

    def watch(optimizer: torch.optim.Optimizer, *_: object) -> None:
        seen.append(
            torch.cat(
                [p.grad.detach().flatten() for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            )
        )

    handle = register_optimizer_step_pre_hook(watch)
    try:
        _, loss = next(
            train(
                engine,
                task.loss,
                lengths=task.lengths,
                units=task.units,
                batch_size=job.training.batch_size,
                micro_batch_size=job.training.micro_batch_size,
                start_step=0,
                total_steps=1,
                seed=0,
                name_of=task.name,
            )
        )
    finally:
        handle.remove()
    return float(engine.mean(torch.tensor(loss, dtype=torch.float64))), seen[0]


def main(base: str, root: str, rank: int) -> None:
    """Write what each kind of training finds on two workers, and what each worker says of a pair that is not finite."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=WORLD)
    run = Run(str(Path(root).parent), Path(root).name)
    found: dict[str, Any] = {kind: take_step(run, job_of(kind, run, base, 2, WORLD)) for kind in KINDS}
    found["stopped"] = []
    for stage in (0, 1, 3):
        try:
            take_step(run, job_of("dpo", run, base, 2, WORLD, part="nan", zero_stage=stage))
        except NonFiniteError as error:
            found["stopped"].append(str(error))
    torch.save(found, Path(root) / f"found-{rank}.pt")
    print(json.dumps(sorted(found)), flush=True)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
