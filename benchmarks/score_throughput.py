"""Sequences per second of scoring: the stage, the stacked forward under it, and what a user would write instead.

Everything scores the same texts, samples of the testbed's base model as the sampling stage leaves them (m responses to
a prompt, log π_ref included), under K random LoRA policies on that base, one thread each, no reward model:

    stage      Ray Data with one actor and with two: read a file of samples, score it, write the score table
    stacked    Ensemble.logprobs on tokens in memory: the K adapters are K groups of rows of one forward pass
    separate   K passes, PEFT's set_adapter before each: padded batches sorted by length, log-softmax and gather
    packed     K passes of PEFT models as well, but through our CompletionModel, which leaves out padding
    vllm       what `scoring.engine: vllm` does, where vLLM is installed (`make test-vllm` makes .venv-vllm)

Those in memory take turns, file by file. Start-up is left out everywhere: the clock of the stage starts when every
actor has finished a file and stops with the last one, which is read off the files; the others go once through the first
file before. Rates are wall time; where other work shares the processors, the ratios of processor seconds say more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
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
from shared_material import find_testbed

from mpo_ray.cluster.parts import Part, process_parts
from mpo_ray.cluster.score import SampleScorer, draw, sequences
from mpo_ray.cluster.session import ray_session
from mpo_ray.config import Actors
from mpo_ray.data.tokens import collate
from mpo_ray.decoding.sampler import MixtureSampler, Room, sampling_recipe
from mpo_ray.policies.ensemble import Ensemble, by_length, sequence_logprobs
from mpo_ray.policies.loading import add_adapter, load_model, load_rendering, load_tokenizer
from mpo_ray.policies.mixture import mixture_of_one
from mpo_ray.records import REFERENCE
from mpo_ray.run import Run

TOLERANCE = 1e-3
Scores = list[dict[str, np.ndarray]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=8, help="files of samples; the first ones warm up")
    parser.add_argument("--prompts", type=int, default=16, help="prompts in a file")
    parser.add_argument("--samples", type=int, default=8, help="responses to a prompt")
    parser.add_argument("--policies", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    testbed = find_testbed()
    if testbed is None:
        return 0
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    base = str(testbed / "base")

    with tempfile.TemporaryDirectory(prefix="score-throughput-") as directory:
        run = Run(directory, "run")
        run.write_text("config.yaml", "name: run\n")  # which makes it a run directory
        policies = {f"policy{k}": random_lora(Path(directory), base, seed=k) for k in range(options.policies)}
        tables = sample_tables(testbed, options.parts, options.prompts, options.samples)
        for index, table in enumerate(tables):
            run.write_table(f"samples/{index:03d}.parquet", table)
        expected, seconds = in_memory(base, policies, tables, options.batch_size, options.repeats)
        arguments = {"reference": base, "policies": policies, "rewards": {}, "beta": 0.5}
        rates: dict[int, list[float]] = {1: [], 2: []}
        largest = max(difference(expected["stacked"], expected[name]) for name in expected)
        with ray_session():
            for repeat in range(options.repeats):
                for num_actors in rates:
                    actors = Actors(num_actors=num_actors, batch_size=options.batch_size)
                    rate, written = stage(run, arguments, actors, f"scores{repeat}-{num_actors}", len(tables))
                    rates[num_actors].append(rate)
                    largest = max(largest, difference(written, expected["stacked"]))

    report(rates, seconds, num_sequences=tables[0].num_rows)
    print(f"largest difference of a log-ratio: {largest:.1e} (at most {TOLERANCE})")
    if largest > TOLERANCE:
        print("the sides do not compute the same scores: the ratios mean nothing", file=sys.stderr)
        return 1
    return 0


def report(rates: dict[int, list[float]], seconds: dict[str, np.ndarray], *, num_sequences: int) -> None:
    """Print rates and ratios. seconds: by side (passes over a file, 2), of wall time and of the processor."""
    wall = {name: num_sequences / values[:, 0] for name, values in seconds.items()}
    shown = {"stage, 1 actor": np.array(rates[1]), "stage, 2 actors": np.array(rates[2]), **wall}
    for name, values in shown.items():
        low, middle, high = np.percentile(values, [0, 50, 100])
        print(f"{name:>15}: {middle:7.1f} sequences/s (median of {len(values)}; from {low:.1f} to {high:.1f})")
    medians = {name: float(np.median(values)) for name, values in shown.items()}
    processor = {name: float(np.median(values[:, 1])) for name, values in seconds.items()}

    def ratio(what: str, value: float, note: str) -> None:
        print(f"ratio of the medians, {what}: {value:.2f} ({note})")

    ratio("stage, 1 actor/stacked", medians["stage, 1 actor"] / medians["stacked"], "goal 0.9")
    for other in [name for name in seconds if name != "stacked"]:
        note = "goal 1.8" if other == "separate" else "no goal"
        cost = processor[other] / processor["stacked"]
        ratio(f"stacked/{other}", medians["stacked"] / medians[other], f"{note}; of processor seconds {cost:.2f}")
    ratio("stage, 2 actors/1 actor/2", medians["stage, 2 actors"] / medians["stage, 1 actor"] / 2, "efficiency")


def stage(run: Run, arguments: dict[str, Any], actors: Actors, target: str, num_parts: int) -> tuple[float, Scores]:
    """Sequences per second once every actor has finished a file, and what was written."""
    parts = [Part(f"samples/{i:03d}.parquet", f"{target}/{i:03d}.parquet", target) for i in range(num_parts)]
    given = {**arguments, "actors": actors.model_dump(), "rendering": {}}
    process_parts(run, parts, SampleScorer, given, actors=actors, console=Console(quiet=True), title="scores")
    tables = [run.read_table(part.target) for part in parts]
    finished = sorted((run.local / part.target).stat().st_mtime for part in parts)
    counted = (num_parts - actors.num_actors) * tables[0].num_rows
    rate = counted / (finished[-1] - finished[actors.num_actors - 1])
    names = arguments["policies"]
    return rate, [{name: table[f"log_ratio_{name}"].to_numpy() for name in names} for table in tables]


def in_memory(
    base: str, policies: dict[str, str], tables: list[pa.Table], batch_size: int, repeats: int
) -> tuple[dict[str, Scores], dict[str, np.ndarray]]:
    """The log-ratios of every file by each way, and the seconds (wall, processor) of every pass over one."""
    names = list(policies)
    stack = Ensemble(base, policies)
    plain, packed = adapted_model(base, policies), adapted_model(base, policies)
    how: dict[str, Any] = {"batch_size": batch_size, "pad_id": load_tokenizer(base).pad_token_id}

    def one_by_one(model: Any, score: Callable[..., list[float]], rows: Any) -> dict[str, list[float]]:
        values = {}
        for name in names:
            model.set_adapter(name)
            values[name] = score(model, rows, **how)
        return values

    sides: dict[str, Callable[[Any], dict[str, list[float]]]] = {
        "stacked": lambda rows: stack.logprobs(names, rows, **how),
        "separate": lambda rows: one_by_one(plain, padded_logprobs, rows),
        "packed": lambda rows: one_by_one(packed, sequence_logprobs, rows),
    }
    if find_spec("vllm") is not None:
        from mpo_ray.decoding.sampler import Room
        from mpo_ray.vllm_plugin.scoring import VllmEnsemble

        by_vllm = VllmEnsemble(base, policies, room=Room(batch_size))
        sides["vllm"] = lambda rows: by_vllm.logprobs(names, rows, **how)
    scores: dict[str, Scores] = {name: [] for name in sides}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for score in sides.values():
        score(sequences(tables[0]))
    for repeat in range(repeats):
        for table in tables:
            rows, log_ref = sequences(table), np.array(table["log_ref"].to_pylist())
            for side, score in sides.items():
                began, began_cpu = time.perf_counter(), time.thread_time()
                values = score(rows)
                seconds[side].append((time.perf_counter() - began, time.thread_time() - began_cpu))
                if repeat == 0:
                    scores[side].append({name: np.array(values[name]) - log_ref for name in names})
    return scores, {side: np.array(values) for side, values in seconds.items()}


@torch.no_grad()
def padded_logprobs(model: Any, rows: Any, *, batch_size: int, pad_id: int) -> list[float]:
    """log π(completion | prompt) as one writes it with transformers: every logit, log-softmax, gather."""
    values = [0.0] * len(rows)
    order = by_length(rows)
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        batch = collate([rows[i] for i in chunk], pad_id=pad_id)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        logprobs = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
        sums = (logprobs * batch.completion_mask[:, 1:]).sum(-1).double()
        for i, value in zip(chunk, sums.tolist(), strict=True):
            values[i] = value
    return values


def adapted_model(base: str, policies: dict[str, str]) -> Any:
    """The base with all the adapters on it, as PEFT has them."""
    model: Any = load_model(base)
    for name, path in policies.items():
        model = add_adapter(model, path, name=name)
    return model


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
    load_tokenizer(base).save_pretrained(path)
    return path


def sample_tables(testbed: Path, num_parts: int, num_prompts: int, num_samples: int) -> list[pa.Table]:
    """Samples of the base model as the sampling stage leaves them, log π_ref included."""
    rendering, reference = load_rendering(str(testbed / "base")), load_model(str(testbed / "base"))
    sampler = MixtureSampler(mixture_of_one(REFERENCE, load_model(str(testbed / "base"))), Room(64))
    recipe = sampling_recipe({REFERENCE: 1.0}, max_new_tokens=96, temperature=1.0)
    lines = (testbed / "prompts_test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: num_parts * num_prompts]]
    tables = []
    for part in range(num_parts):
        chosen = rows[part * num_prompts : (part + 1) * num_prompts]
        prompts = pa.Table.from_pylist([{**row, "is_chat": False} for row in chosen])
        table = draw(sampler, recipe, rendering, prompts, num=num_samples, seed=part)
        log_ref = sequence_logprobs(reference, sequences(table), batch_size=64, pad_id=rendering.tokenizer.pad_token_id)
        tables.append(table.append_column("log_ref", [log_ref]))
    return tables


def difference(tables: Scores, others: Scores) -> float:
    """The largest difference between the log-ratios of two sides."""
    return max(float(np.abs(a[name] - b[name]).max()) for a, b in zip(tables, others, strict=True) for name in a)


if __name__ == "__main__":
    sys.exit(main())
