"""Sequences per second of the scoring stage (Ray Data, one actor) and of the same models called directly, in turns.

Both score the same texts in the same parts: log-probabilities under K LoRA policies on one base, and the rewards of a
sequence classifier. The direct side holds tokens in memory and does nothing but batched forward passes (sorted by
length, the same batch size and threads); the stage also starts from files, tokenises, and writes score tables.

Start-up is left out of both in the same way: the clock starts when the first part is finished and stops with the last,
so loading models, starting actors and the first passes do not count. For the stage that is read off its output files.
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
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import pyarrow as pa
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console

from mpo_ray.cluster.parts import Part, process_parts
from mpo_ray.cluster.score import SampleScorer
from mpo_ray.cluster.session import ray_session
from mpo_ray.config import Actors
from mpo_ray.data.tokens import collate, prompt_token_ids, response_token_ids
from mpo_ray.policies.loading import load_model, load_policy, load_reward_model, load_tokenizer
from mpo_ray.policies.policy_set import sequence_logprobs
from mpo_ray.run import Run

TOLERANCE = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=4, help="files of samples; the first one warms up")
    parser.add_argument("--part-size", type=int, default=256, help="samples in a file")
    parser.add_argument("--policies", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    shared = Path(os.environ.get("MPO_RAY_SHARED") or Path(__file__).parents[2] / "shared")
    testbed = shared / "testbed" / "imdb"
    if not testbed.is_dir():
        print(f"skipped: the testbed is not at {testbed}; set MPO_RAY_SHARED")
        return 0
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    base, reward = str(testbed / "base"), str(testbed / "reward_positive")

    with tempfile.TemporaryDirectory(prefix="score-throughput-") as directory:
        run = Run(directory, "run")
        run.write_text("config.yaml", "name: run\n")  # which makes it a run directory
        policies = {f"policy{k}": random_lora(Path(directory), base, seed=k) for k in range(options.policies)}
        tables = sample_tables(testbed, options.parts, options.part_size)
        for index, table in enumerate(tables):
            run.write_table(f"samples/{index:03d}.parquet", table)
        bare = Bare(base, policies, reward, tables, options.batch_size)
        actors = Actors(num_actors=1, batch_size=options.batch_size)
        arguments = {
            "reference": base,
            "policies": policies,
            "rewards": {name: reward if k == 0 else "implicit" for k, name in enumerate(policies)},
            "beta": 0.5,
            "actors": actors.model_dump(),
        }
        rates: dict[str, list[float]] = {"stage": [], "bare": []}
        largest = 0.0
        counted = (options.parts - 1) * options.part_size
        with ray_session():
            for repeat in range(options.repeats):
                parts = [
                    Part(f"samples/{i:03d}.parquet", f"scores{repeat}/{i:03d}.parquet", "of the benchmark")
                    for i in range(len(tables))
                ]
                process_parts(
                    run, parts, SampleScorer, arguments, actors=actors, console=Console(quiet=True), title="scores"
                )
                written = sorted((run.local / part.target).stat().st_mtime for part in parts)
                rates["stage"].append(counted / (written[-1] - written[0]))
                expected, seconds = bare.score()
                rates["bare"].append(counted / seconds)
                largest = max(largest, difference([run.read_table(part.target) for part in parts], expected))

    for name, values in rates.items():
        low, middle, high = np.percentile(values, [0, 50, 100])
        print(f"{name:>5}: {middle:7.1f} sequences/s (median of {len(values)} passes; from {low:.1f} to {high:.1f})")
    print(f"ratio of the medians, stage/bare: {np.median(rates['stage']) / np.median(rates['bare']):.2f} (goal 0.85)")
    print(f"largest difference of a log-ratio or reward: {largest:.1e} (at most {TOLERANCE})")
    if largest > TOLERANCE:
        print("the two sides do not compute the same scores: the ratio means nothing", file=sys.stderr)
        return 1
    return 0


def random_lora(directory: Path, base: str, *, seed: int) -> str:
    """Save an adapter of rank 16 with random factors: a policy that is not the base."""
    model = get_peft_model(
        load_model(base), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    path = str(directory / f"adapter{seed}")
    model.save_pretrained(path)
    return path


def sample_tables(testbed: Path, num_parts: int, part_size: int) -> list[pa.Table]:
    """Responses of the testbed's pairs as the sampling stage leaves them, log π_ref included."""
    tokenizer, reference = load_tokenizer(str(testbed / "base")), load_model(str(testbed / "base"))
    with gzip.open(testbed / "pairs.jsonl.gz", "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    rows: list[dict[str, Any]] = []
    for pair in pairs:
        rows += [
            {
                "prompt_id": pair["id"],
                "sample_id": index,
                "prompt": pair["prompt"],
                "is_chat": False,
                "response": pair[side],
                "prompt_ids": prompt_token_ids(tokenizer, pair["prompt"]),
                "response_ids": response_token_ids(tokenizer, pair[side]),
            }
            for index, side in enumerate("ab")
        ]
        if len(rows) >= num_parts * part_size:
            break
    tables = [pa.Table.from_pylist(rows[i * part_size : (i + 1) * part_size]) for i in range(num_parts)]
    log_ref = [sequence_logprobs(reference, token_rows(table), batch_size=64, pad_id=0) for table in tables]
    return [table.append_column("log_ref", [values]) for table, values in zip(tables, log_ref, strict=True)]


def token_rows(table: pa.Table) -> list[tuple[list[int], list[int]]]:
    return list(zip(table["prompt_ids"].to_pylist(), table["response_ids"].to_pylist(), strict=True))


class Bare:
    """The models themselves: transformers' and PEFT's own forward, on batches that are ready in memory."""

    def __init__(
        self, base: str, policies: dict[str, str], reward: str, tables: list[pa.Table], batch_size: int
    ) -> None:
        self._policies = {name: load_policy(path, base) for name, path in policies.items()}
        self._reward, tokenizer = load_reward_model(reward)
        self._log_ref = [np.array(table["log_ref"].to_pylist()) for table in tables]
        self._parts: list[list[tuple[list[int], Any, Any]]] = []
        for table in tables:
            rows = token_rows(table)
            texts = [a + b for a, b in zip(table["prompt"].to_pylist(), table["response"].to_pylist(), strict=True)]
            order = sorted(range(len(rows)), key=[len(a) + len(b) for a, b in rows].__getitem__)
            chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
            self._parts.append(
                [
                    (
                        chunk,
                        collate([rows[i] for i in chunk], pad_id=0),
                        tokenizer([texts[i] for i in chunk], return_tensors="pt", padding=True, padding_side="right"),
                    )
                    for chunk in chunks
                ]
            )

    @torch.no_grad()
    def score(self) -> tuple[list[dict[str, np.ndarray]], float]:
        """The scores of every part, and the seconds from the end of the first part to the end of the last."""
        scores, finished = [], []
        for part, log_ref in zip(self._parts, self._log_ref, strict=True):
            columns = {name: np.empty(len(log_ref)) for name in [*self._policies, "reward"]}
            for chunk, batch, texts in part:
                targets = batch.input_ids[:, 1:, None]
                for name, model in self._policies.items():
                    logits = model(
                        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
                    ).logits
                    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, targets).squeeze(-1)
                    columns[name][chunk] = (logprobs * batch.completion_mask[:, 1:]).sum(-1).double() - log_ref[chunk]
                inputs = {"input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"]}
                columns["reward"][chunk] = self._reward(**inputs).logits[:, 0]
            scores.append(columns)
            finished.append(time.perf_counter())
        return scores, finished[-1] - finished[0]


def difference(tables: list[pa.Table], expected: list[dict[str, np.ndarray]]) -> float:
    """The largest difference between a score table and the direct computation."""
    largest = 0.0
    for table, columns in zip(tables, expected, strict=True):
        first = next(iter(columns))
        for name, values in columns.items():
            found = table[f"reward_{first}" if name == "reward" else f"log_ratio_{name}"].to_numpy()
            largest = max(largest, float(np.abs(found - values).max()))
    return largest


if __name__ == "__main__":
    sys.exit(main())
