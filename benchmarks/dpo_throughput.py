"""Tokens per second of our DPO step and of TRL's `DPOTrainer`, in one process, taking turns.

Both train the same LoRA (same initial weights) on the same pairs in the same order and batches, in fp32, with the same
AdamW, schedule, clipping and number of threads, from reference log-probabilities computed beforehand. The losses of
the first steps must agree. TRL runs its own training loop; ours runs whenever TRL has done a block of steps.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
import torch.distributed as dist
from shared_material import find_testbed

from mpo_ray.cluster.deepspeed_engine import DeepSpeedEngine
from mpo_ray.config_training import PolicyTraining
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.policies.ensemble import sequence_logprobs
from mpo_ray.policies.loading import load_model, load_rendering, load_tokenizer
from mpo_ray.training.loop import train
from mpo_ray.training.order import batch_indices
from mpo_ray.training.preference import Pair, preference_loss

COMPARED_STEPS = 20
TOLERANCE = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of one block")
    parser.add_argument("--repeats", type=int, default=6, help="blocks of each side")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs per step")
    parser.add_argument("--objective", default="concise")
    parser.add_argument("--zero-stage", type=int, default=1, choices=(0, 1, 2, 3))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    testbed = find_testbed()
    if testbed is None:
        return 0
    try:
        import trl  # noqa: F401
    except ImportError:
        print("skipped: trl is not installed; pip install 'mpo_ray[bench]'")
        return 0
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)

    total_steps = options.steps * options.repeats
    training = PolicyTraining.model_validate(
        {
            "batch_size": options.batch_size,
            "micro_batch_size": options.batch_size,
            "learning_rate": 1e-3,
            "zero_stage": options.zero_stage,
        }
    )
    pairs = read_pairs(testbed, options.objective, most=total_steps * options.batch_size)
    order = [
        batch_indices(step, num_examples=len(pairs), batch_size=options.batch_size, seed=0)
        for step in range(total_steps)
    ]
    tokens = [sum(num_tokens(pairs[i]) for i in batch) for batch in order]

    base = str(testbed / "base")
    scratch = tempfile.TemporaryDirectory(prefix="dpo-throughput-")
    theirs = TrlSide(
        base, pairs, order, training, scratch.name
    )  # first: a process group would make it wrap its model in DDP
    ours = our_steps(base, pairs, training, total_steps, scratch.name)
    our_losses: list[float] = []
    our_seconds: list[float] = []

    def our_block() -> None:
        start = time.perf_counter()
        our_losses.extend(next(ours)[1] for _ in range(options.steps))
        our_seconds.append(time.perf_counter() - start)

    theirs.run(block=options.steps, between=our_block)
    blocks = np.array(tokens).reshape(options.repeats, options.steps).sum(axis=1)
    rates = {name: blocks / np.array(s) for name, s in (("ours", our_seconds), ("TRL", theirs.seconds))}
    for name, values in rates.items():
        low, middle, high = np.percentile(values, [0, 50, 100])
        print(f"{name:>5}: {middle:8,.0f} tokens/s (median of {len(values)} blocks; from {low:,.0f} to {high:,.0f})")
    print(f"ratio of the medians, ours/TRL: {np.median(rates['ours']) / np.median(rates['TRL']):.2f} (goal 1.2)")

    compared = min(COMPARED_STEPS, total_steps)
    differences = [abs(a - b) for a, b in zip(our_losses[:compared], theirs.losses[:compared], strict=True)]
    print(f"first {compared} losses:\n step     ours      TRL  difference")
    for step in range(compared):
        print(f"{step + 1:5d} {our_losses[step]:8.5f} {theirs.losses[step]:8.5f}    {differences[step]:.1e}")
    print(f"largest difference: {max(differences):.1e} (at most {TOLERANCE})")
    if max(differences) > TOLERANCE:
        print("the two sides do not compute the same training: the ratio means nothing", file=sys.stderr)
        return 1
    return 0


def read_pairs(testbed: Path, objective: str, *, most: int) -> list[Pair]:
    """The testbed's pairs with a preference and two responses, tokenised, with log π_ref of both."""
    rendering = load_rendering(str(testbed / "base"))
    with gzip.open(testbed / "pairs.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if row[objective] in (0, 1) and row["a"] and row["b"]][:most]
    prompts = [rendering.prompt_ids(row["prompt"]) for row in rows]
    chosen = [rendering.ids(row["prompt"], row["a" if row[objective] == 1 else "b"])[1] for row in rows]
    rejected = [rendering.ids(row["prompt"], row["b" if row[objective] == 1 else "a"])[1] for row in rows]
    reference = load_model(str(testbed / "base"))
    log_ref = [
        sequence_logprobs(reference, list(zip(prompts, side, strict=True)), batch_size=64, pad_id=0)
        for side in (chosen, rejected)
    ]
    return [Pair(*values) for values in zip(prompts, chosen, rejected, *log_ref, strict=True)]


def num_tokens(pair: Pair) -> int:
    """Real tokens that a step reads of a pair: its prompt twice, both completions, no padding."""
    return 2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def lora_model(base: str, training: PolicyTraining) -> Any:
    """The base with a new LoRA; the same weights at every call."""
    from peft import LoraConfig, get_peft_model

    lora = training.lora
    assert lora is not None
    torch.manual_seed(0)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM")
    return get_peft_model(load_model(base), config)


def our_steps(
    base: str, pairs: list[Pair], training: PolicyTraining, total_steps: int, scratch: str
) -> Iterator[tuple[int, float]]:
    """Our training loop on the DeepSpeed engine of a Ray Train worker, here in a process group of one."""
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=0, world_size=1)
    device = torch.device("cpu")
    engine = DeepSpeedEngine(
        CompletionModel(lora_model(base, training)), training, total_steps=total_steps, device=device
    )

    def loss_of(examples: np.ndarray) -> torch.Tensor:
        return preference_loss(
            engine.model,
            [pairs[i] for i in examples],
            loss="dpo",
            beta=training.beta,
            length_normalized=False,
            pad_id=0,
            device=device,
        ).losses.sum()

    return train(
        engine,
        loss_of,
        lengths=np.array([pair.num_tokens for pair in pairs]),
        units=np.ones(len(pairs)),
        batch_size=training.batch_size,
        micro_batch_size=training.micro_batch_size,
        start_step=0,
        total_steps=total_steps,
        seed=0,
    )


class TrlSide:
    """TRL's trainer on the same pairs, already tokenised, in the same order."""

    def __init__(
        self, base: str, pairs: list[Pair], order: list[np.ndarray], training: PolicyTraining, scratch: str
    ) -> None:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import DPOConfig, DPOTrainer

        rows = [pairs[i] for batch in order for i in batch]
        columns = {
            "prompt_ids": [list(pair.prompt_ids) for pair in rows],
            "chosen_ids": [list(pair.chosen_ids) for pair in rows],
            "rejected_ids": [list(pair.rejected_ids) for pair in rows],
        }
        losses: list[float] = []
        seconds: list[float] = []
        self.losses, self.seconds = losses, seconds

        class Tokenised(DPOTrainer):
            def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                return dataset

            def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
                loss = super().compute_loss(*args, **kwargs)
                losses.append(float(loss.detach()))
                return loss

        class TakeTurns(TrainerCallback):  # type: ignore[misc]
            between, block = staticmethod(lambda: None), 1
            start = 0.0

            def on_train_begin(self, *_: Any, **__: Any) -> None:
                self.start = time.perf_counter()

            def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
                if state.global_step % self.block == 0:
                    seconds.append(time.perf_counter() - self.start)
                    self.between()
                    self.start = time.perf_counter()

        model = lora_model(base, training)
        self._turns = TakeTurns()
        total_steps = len(order)
        self._trainer = Tokenised(
            model=model,
            args=DPOConfig(
                output_dir=scratch,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                precompute_ref_log_probs=True,
                precompute_ref_batch_size=32,
                beta=training.beta,
                max_length=None,
                per_device_train_batch_size=training.batch_size,
                train_sampling_strategy="sequential",
                max_steps=total_steps,
                learning_rate=training.learning_rate,
                lr_scheduler_type=training.schedule,
                warmup_steps=round(training.warmup_share * total_steps),
                weight_decay=training.weight_decay,
                max_grad_norm=training.max_grad_norm,
                optim="adamw_torch_fused",  # its default, and its fastest
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict(columns),
            processing_class=load_tokenizer(base),
            callbacks=[self._turns],
        )
        self._trainer.remove_callback(PrinterCallback)

    def run(self, *, block: int, between: Any) -> None:
        self._turns.block, self._turns.between = block, between
        self._trainer.train()


if __name__ == "__main__":
    sys.exit(main())
