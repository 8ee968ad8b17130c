"""What HTTP and Ray Serve cost: the endpoint against the engine alone, with the same requests.

    python benchmarks/serving.py [--blocks 5] [--requests 160] [--max-tokens 100] [--single 40]

Under test are mixtures of K = 3 random LoRA policies, on the testbed's base model and on 12 layers of d = 576 with
random weights (the shape of benchmarks/decoding.py, the testbed's vocabulary). `engine` is an EngineThread in this
process; `endpoint` the same engine in a replica of the Serve application, asked over HTTP by locust, in a process of
its own. Both decode the same prompts with the same seeds, so the same tokens, with as many streams at a time: 32 for
tokens per second, 1 for the time to the first token. They take turns, block by block; the figures are medians of the
blocks' ratios (tokens per second) and of all requests (time to the first token).

As for `mpo-ray serve`, Ray's HAProxy stands before the endpoint; with RAY_SERVE_ENABLE_HA_PROXY=0, Ray's own proxy.

Last, a full queue: users who ask again and again keep as many requests running and waiting as may; how soon is one
more refused?
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # what Ray gives a replica with one CPU

from mpo_ray.serving.haproxy import haproxy_environment

os.environ.update(haproxy_environment())

import httpx
import psutil
import ray
import torch
from decoding import NAMES, random_adapters, random_model
from ray import serve as ray_serve
from shared_material import find_testbed

from mpo_ray.config_serving import Serve
from mpo_ray.data.rendering import Rendering
from mpo_ray.decoding.engine_thread import EngineThread
from mpo_ray.decoding.open_engine import open_engine
from mpo_ray.decoding.protocol import GenerationRequest, Sampling
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.loading import load_tokenizer
from mpo_ray.serving.service import serve_endpoint

STREAMS = 32
LOAD = Path(__file__).with_name("serving_load.py")
Seen = list[dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5, help="of each side")
    parser.add_argument("--requests", type=int, default=160, help="in a block of 32 streams at a time")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--messages-per-step", type=float, default=Serve().messages_per_step)
    parser.add_argument("--single", type=int, default=40, help="requests in a block of one after the other")
    options = parser.parse_args()

    testbed = find_testbed()
    if testbed is None:
        return 0
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    lines = (testbed / "prompts_test.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]

    with tempfile.TemporaryDirectory(prefix="serving-") as directory:
        root = Path(directory)
        tokenizer = load_tokenizer(str(testbed / "base"))
        shaped = random_model("cpu", root / "base", vocab_size=len(tokenizer))
        tokenizer.save_pretrained(shaped)
        bases = {"testbed": testbed / "base", "12 layers, d = 576, random weights": shaped}
        return max([measure(title, base, root, prompts, options) for title, base in bases.items()])


def measure(title: str, base: Path, root: Path, prompts: list[str], options: argparse.Namespace) -> int:
    """Serve a mixture on this base, ask both sides, and print what was seen; 1 if a request failed."""
    print(f"\n{title}")
    artefact = random_mixture(root / base.parent.name, base)
    many = bodies(prompts, options.requests, options.max_tokens)
    few = bodies(prompts, options.single, 8)
    serve = Serve(
        port=0,
        max_replicas=1,
        max_num_seqs=STREAMS,
        target_ongoing_requests=STREAMS,
        max_tokens=options.max_tokens,
        messages_per_step=options.messages_per_step,
    )
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        url = serve_endpoint(str(artefact), serve, "mixture", blocking=False)
        engine = EngineThread(open_engine(str(artefact), max_num_seqs=STREAMS))
        tokenizer = load_tokenizer(str(artefact))
        spend: list[dict[str, float]] = []

        def turn(requests: list[dict[str, Any]], streams: int) -> tuple[Seen, Seen]:
            before = processor_seconds()
            alone = asyncio.run(through_engine(engine, tokenizer, requests, streams))
            between = processor_seconds()
            seen = through_http(url, requests, streams, root)
            spent = {name: value - between[name] for name, value in processor_seconds().items() if name != "driver"}
            spend.append({**spent, "engine alone": between["driver"] - before["driver"]})
            return alone, seen

        turn(few, 1), turn(many[:STREAMS], STREAMS)  # warm
        spend.clear()
        loaded = [turn(many, STREAMS) for _ in range(options.blocks)]
        report_processor(spend, loaded)
        single = [turn(few, 1) for _ in range(options.blocks)]
        refused = asyncio.run(refusals(url, prompts, options.max_tokens))
        engine.close()
    finally:
        ray_serve.shutdown()
        ray.shutdown()
    return report(loaded, single, refused)


def report(loaded: list[tuple[Seen, Seen]], single: list[tuple[Seen, Seen]], refused: list[float]) -> int:
    if bad := [one for _, seen in loaded + single for one in seen if one["status"] != 200]:
        print(f"{len(bad)} requests failed: {bad[0]}", file=sys.stderr)
        return 1
    pairs = [(rate(alone), rate(seen)) for alone, seen in loaded]
    for name, values in zip(("engine", "endpoint"), zip(*pairs, strict=True), strict=True):
        print(
            f"{name:>9}: {median(values):7.0f} tokens/s "
            f"(median of {len(values)}; {min(values):.0f} to {max(values):.0f})"
        )
    ratios = [seen / alone for alone, seen in pairs]
    print(
        f"ratio of tokens per second, {STREAMS} streams: {median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}; goal 0.85)"
    )
    firsts = [[1e3 * (one["first"] - one["start"]) for block in single for one in block[side]] for side in (0, 1)]
    for name, milliseconds in zip(("engine", "endpoint"), firsts, strict=True):
        print(f"{name:>9}: first token after {median(milliseconds):5.1f} ms (median of {len(milliseconds)})")
    print(f"added time to the first token: {median(firsts[1]) - median(firsts[0]):.1f} ms (goal 20)")
    if refused:
        print(f"full queue: refused after {1e3 * median(refused):.1f} ms (median of {len(refused)}; goal 50)")
    else:
        print("full queue: no request was refused, so nothing was measured", file=sys.stderr)
    tokens = [[sum(one["tokens"] for one in seen) for seen in side] for side in zip(*loaded, strict=True)]
    if any(abs(mine - other) > 0.01 * mine for mine, other in zip(*tokens, strict=True)):  # crowds differ in rounding
        print(f"the sides do not decode the same tokens: {tokens}", file=sys.stderr)
        return 1
    return 0


def processor_seconds() -> dict[str, float]:
    """Of this process, and of those of Serve that it started."""
    names = {"MixtureReplica": "replica", "Endpoint": "ingress", "ProxyActor": "proxy"}
    found = {"driver": time.process_time(), **dict.fromkeys(names.values(), 0.0)}
    for process in psutil.Process().children(recursive=True):
        title = " ".join(process.cmdline())
        for part, name in names.items():
            if title.startswith("ray::") and part in title:
                times = process.cpu_times()
                found[name] += times.user + times.system
    return found


def report_processor(spend: list[dict[str, float]], loaded: list[tuple[Seen, Seen]]) -> None:
    tokens = [sum(one["tokens"] for one in alone) for alone, _ in loaded]
    milliseconds = {name: median(1e3 * s[name] / n for s, n in zip(spend, tokens, strict=True)) for name in spend[0]}
    print("processor ms per token: " + ", ".join(f"{name} {value:.2f}" for name, value in milliseconds.items()))


def rate(seen: Seen) -> float:
    return float(sum(one["tokens"] for one in seen) / (max(s["end"] for s in seen) - min(s["start"] for s in seen)))


def bodies(prompts: list[str], number: int, max_tokens: int) -> list[dict[str, Any]]:
    """Request bodies: as many prompts, each with its seed."""
    return [
        {
            "model": "mixture",
            "prompt": prompts[index % len(prompts)],
            "max_tokens": max_tokens,
            "seed": index,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for index in range(number)
    ]


async def through_engine(engine: EngineThread, tokenizer: Any, requests: list[dict[str, Any]], streams: int) -> Seen:
    waiting, seen = iter(enumerate(requests)), []

    async def user() -> None:
        for index, body in waiting:
            record: dict[str, Any] = {"start": time.perf_counter(), "first": None, "tokens": 0, "status": 200}
            sampling = Sampling(max_tokens=body["max_tokens"], seed=body["seed"])
            ids = tuple(Rendering(tokenizer).prompt_ids(body["prompt"]))
            async for delta in engine.generate(GenerationRequest(str(index), ids, sampling)):
                record["first"] = record["first"] or time.perf_counter()
                record["tokens"] += len(delta.tokens)
            record["end"] = time.perf_counter()
            seen.append(record)

    await asyncio.gather(*(user() for _ in range(streams)))
    return seen


async def refusals(url: str, prompts: list[str], max_tokens: int, probes: int = 30) -> list[float]:
    """Seconds until one request more is refused, while as many run and wait as may."""
    limits = httpx.Limits(max_connections=None)
    seeds = itertools.count()
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def ask() -> tuple[int, float]:
            [body] = bodies(prompts[next(seeds) % len(prompts) :], 1, max_tokens)
            began = time.perf_counter()
            answer = await client.post("/v1/completions", json=body)
            return answer.status_code, time.perf_counter() - began

        async def user() -> None:
            while True:
                status, _ = await ask()
                if status == 429:
                    await asyncio.sleep(1.0)

        serve = Serve(target_ongoing_requests=STREAMS)
        crowd = [asyncio.create_task(user()) for _ in range(serve.ongoing_requests + serve.max_queued_requests + 8)]
        found: list[float] = []
        await asyncio.sleep(5)
        for _ in range(10 * probes):
            try:
                status, seconds = await asyncio.wait_for(ask(), 1.0)
            except TimeoutError:  # there was room: it waits in the queue, and leaves it again
                continue
            found += [seconds] * (status == 429)
            if len(found) == probes:
                break
            await asyncio.sleep(0.1)
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
    return found


def through_http(url: str, requests: list[dict[str, Any]], streams: int, directory: Path) -> Seen:
    given, found = directory / "requests.json", directory / "results.json"
    given.write_text(json.dumps(requests), encoding="utf-8")
    found.unlink(missing_ok=True)
    command = [sys.executable, "-m", "locust", "--headless", "--locustfile", str(LOAD), "--host", url, "--only-summary"]
    command += ["--users", str(streams), "--spawn-rate", "1000", "--loglevel", "ERROR", "--run-time", "120s"]
    environment = {**os.environ, "LOAD_REQUESTS": str(given), "LOAD_RESULTS": str(found)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if not found.is_file():
        raise RuntimeError(f"locust exited with {done.returncode}: {done.stderr[-2000:]}")
    return list(json.loads(found.read_text(encoding="utf-8")))


def random_mixture(directory: Path, base: Path) -> Path:
    """A mixture of LoRA policies of rank 16 with random factors."""
    policies = random_adapters(base, directory)
    for path in policies.values():
        load_tokenizer(str(base)).save_pretrained(path)
    weights = dict.fromkeys(NAMES, 1 / len(NAMES))
    write_artefact(
        directory / "mixture", objectives=policies, reference=base, copy_reference=True, weights=weights, fit={}
    )
    return directory / "mixture"


if __name__ == "__main__":
    sys.exit(main())
