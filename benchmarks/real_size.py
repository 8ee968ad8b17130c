"""What a real chat model costs, in memory and time, before and after a change: two commits, measured by turns.

    python benchmarks/real_size.py --model SMOLLM2 --before COMMIT [--rows memory ensemble particles turn decoding]

`shared/models/smollm2.py` makes the model. K = 3 LoRA adapters of rank 16 with random factors are put on it. Each
commit runs in processes of its own, from a worktree in a temporary directory, on one thread.

    memory      of a process with an engine at the settings of `serve`'s defaults, after 200 requests, 8 at a time, of
                32 tokens and 8 new ones
    ensemble    copies of the base's weights that an actor of the evaluation with implicit rewards holds
    particles   prompts in the KV cache at the first token of 16 particles of a prompt of 512 tokens
    turn        seconds to the first token of a chat's second turn, with 1,000 tokens before it
    decoding    seconds of a step of the mixture, 1 and 16 requests, fp32, and bf16 on a processor with AMX
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROWS = ("memory", "ensemble", "particles", "turn", "decoding")
NAMES = ("first", "second", "third")
GIB = 2**30
ROUNDS = 9


def _is_packed(found: Any) -> bool:
    return type(found).__name__ == "PackedLinear"


def write_artefact(model: str, directory: Path) -> str:
    """A mixture of three adapters with random factors, in a process that ends: its memory is nobody's."""
    code = f"""
import torch, transformers
from peft import LoraConfig, get_peft_model
from mpo_ray.policies.artefact import write_artefact
places = {{}}
for number, name in enumerate({NAMES!r}):
    torch.manual_seed(number)
    base = transformers.AutoModelForCausalLM.from_pretrained({model!r}, dtype=torch.float32)
    policy = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for key, values in policy.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(values, std=0.01)
    places[name] = {str(directory)!r} + "/" + name
    policy.save_pretrained(places[name])
    transformers.AutoTokenizer.from_pretrained({model!r}).save_pretrained(places[name])
import pathlib
policies = {{name: pathlib.Path(place) for name, place in places.items()}}
write_artefact(pathlib.Path({str(directory / "mixture")!r}), objectives=policies, reference={model!r},
    copy_reference=False, weights=dict.fromkeys(places, 1 / 3), fit={{}})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return str(directory / "mixture")


class Side:
    """A process of one commit that does rows when it is told."""

    def __init__(self, root: Path, artefact: str, model: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        command = [sys.executable, __file__, "--side", str(root), artefact, model]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, row: str, **how: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([row, how]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the side of {row} ended with {self._process.wait()}")
        return json.loads(answer)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def sides(roots: dict[str, Path], artefact: str, model: str) -> Iterator[dict[str, Side]]:
    started = {name: Side(root, artefact, model) for name, root in roots.items()}
    try:
        yield started
    finally:
        for side in started.values():
            side.end()


def compare(rows: list[str], roots: dict[str, Path], artefact: str, model: str) -> None:
    for row in rows:
        if row != "decoding":
            with sides(roots, artefact, model) as both:
                print(
                    f"{row:12}",
                    *(f"{name}: {_shown(side.ask(row))}" for name, side in both.items()),
                    sep="  ",
                    flush=True,
                )
            continue
        with sides(roots, artefact, model) as both:
            for num in (1, 16):
                taken: dict[str, list[float]] = {f"{n} {p}": [] for n in both for p in precisions()}
                for _ in range(ROUNDS):
                    for key, seconds in taken.items():
                        name, precision = key.split()
                        seconds.append(both[name].ask(row, num=num, precision=precision))
                shown = [f"{key} {1000 * median(seconds):.1f} ms" for key, seconds in taken.items()]
                print(f"{row:12}", f"{num} request(s)", *shown, *_speeds(taken), sep="  ", flush=True)


def precisions() -> tuple[str, ...]:
    """bf16 where the processor multiplies it: elsewhere it takes many times as long."""
    information = Path("/proc/cpuinfo")
    known = information.is_file() and "amx_bf16" in information.read_text(encoding="utf-8")
    return ("fp32", "bf16") if known else ("fp32",)


def _speeds(taken: dict[str, list[float]]) -> list[str]:
    """Medians of ratios within a round."""
    pairs = {
        "after/before in fp32": ("before fp32", "after fp32"),
        "bf16/fp32 after": ("after fp32", "after bf16"),
    }
    return [
        f"speed {what} {median(a / b for a, b in zip(taken[slow], taken[fast], strict=True)):.2f}"
        for what, (slow, fast) in pairs.items()
        if {slow, fast} <= taken.keys()
    ]


def _shown(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in found.items())


def serve_rows(root: str, artefact: str, model: str) -> None:
    """The other end of `Side`: rows by this commit's code."""
    import torch
    import transformers

    import mpo_ray

    assert str(mpo_ray.__file__).startswith(root), mpo_ray.__file__
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    doing = Rows(artefact, model)
    for line in sys.stdin:
        row, how = json.loads(line)
        print(json.dumps(getattr(doing, row)(**how)), flush=True)


class Rows:
    """The rows, for the APIs of both commits."""

    def __init__(self, artefact: str, model: str) -> None:
        self._artefact, self._model = artefact, model
        self._engines: dict[tuple[int, str], Any] = {}
        self._number = 0

    def memory(self) -> dict[str, float]:
        import psutil

        from mpo_ray.config_serving import Serve

        me = psutil.Process()
        alone, settings = me.memory_info().rss, Serve()
        engine = self._engine(getattr(settings, "max_num_seqs", 0) or settings.num_lanes)
        for first in range(0, 200, 8):
            self._drain(engine, [self._request(_ids(32, number), 8) for number in range(first, first + 8)])
        runner = engine._runner
        pool = runner.num_tokens * runner.bytes_per_token if hasattr(runner, "num_tokens") else 0
        weights = sum(file.stat().st_size for file in Path(self._artefact).glob("policies/*/*.safetensors"))
        weights += sum(file.stat().st_size for file in Path(self._model).glob("*.safetensors"))
        return {
            "GiB": me.memory_info().rss / GIB,
            "of it before the engine": alone / GIB,
            "weights": weights / GIB,
            "stated pool": pool / GIB,
        }

    def ensemble(self) -> dict[str, float]:
        import gc
        import inspect

        import pyarrow as pa
        import torch

        from mpo_ray.cluster.evaluate import CandidateEvaluator
        from mpo_ray.config import Actors
        from mpo_ray.evaluation.candidates import Candidate
        from mpo_ray.records import encode_prompt

        places = {name: f"{self._artefact}/policies/{name}" for name in NAMES}
        arguments = {
            "artefact": self._artefact,
            "reference": self._model,
            "policies": places,
            "rewards": dict.fromkeys(NAMES, "implicit"),
            "beta": 0.5,
            "actors": Actors(batch_size=4).model_dump(),
            "rendering": {},
            "num_completions": 1,
            "max_new_tokens": 4,
            "temperature": 1.0,
        }
        taken = inspect.signature(CandidateEvaluator).parameters
        evaluator = CandidateEvaluator(**{key: value for key, value in arguments.items() if key in taken})
        text, is_chat = encode_prompt(({"role": "user", "content": "Hello"},))
        table = pa.table({"prompt_id": ["0"], "prompt": [text], "is_chat": [is_chat]})
        for candidate in (Candidate("reference"), Candidate("mixture", (0.5, 0.3, 0.2))):
            evaluator(table, {"candidate": candidate.as_json(), "seed": 0, "num_prompts": 1})
        held = {
            each.data_ptr(): each.nbytes
            for each in gc.get_objects()
            if isinstance(each, torch.nn.Parameter) and each.device.type == "cpu"
        }
        # a packed weight has no address; an older commit has none of them here
        sizes = (each for each in gc.get_objects() if _is_packed(each))
        packed = sum(getattr(each, "num_bytes", 4 * each.in_features * each.out_features) for each in sizes)
        base = sum(file.stat().st_size for file in Path(self._model).glob("*.safetensors"))
        return {"copies of the base": (sum(held.values()) + packed) / base}

    def particles(self) -> dict[str, float]:
        from mpo_ray.decoding.protocol import Mode

        engine = self._engine(16)
        engine.submit(self._request(_ids(512, 0), 64, Mode("smc", 16)))
        while engine._counts.prompt_tokens < 512:
            engine.step()
        now = engine.statistics()
        used = getattr(now, "kv_blocks_used", 0) / (3 * 32) or now.rows_used / 3
        return {"prompts": used}

    def turn(self) -> dict[str, float]:
        import time

        engine = self._engine(4)
        self._drain(engine, [self._request(_ids(64, 5), 4)])
        [first] = self._drain(engine, [self._request(_ids(980, 1), 21)])
        second = self._request([*_ids(980, 1), *first[:20], *_ids(24, 2)], 8)
        begin = time.perf_counter()
        engine.submit(second)
        while not engine.step():
            pass
        return {"seconds": time.perf_counter() - begin}

    def decoding(self, num: int, precision: str) -> float:
        import time

        engine = self._engines.get((num, precision))
        if engine is None:
            engine = self._engines[num, precision] = self._engine(num, precision, context=512)
        steps = 24 if num == 1 else 8
        for number in range(num):
            engine.submit(self._request(_ids(32, number), steps + 34))
        told: set[str] = set()
        while len(told) < num:
            told |= {name for name, _ in engine.step()}
        begin = time.perf_counter()
        for _ in range(steps):
            engine.step()
        seconds = time.perf_counter() - begin
        for name in told:
            engine.abort(name)
        return seconds / steps

    def _engine(self, num: int, precision: str = "fp32", context: int | None = None) -> Any:
        import importlib.util
        import inspect

        import torch

        from mpo_ray.decoding.open_engine import engine_of
        from mpo_ray.policies.mixture import MixtureForCausalLM

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        mixture = MixtureForCausalLM.from_pretrained(self._artefact, dtype=dtype)
        if importlib.util.find_spec("mpo_ray.policies.cpu"):  # an older commit's engine changes the models itself
            cpu = importlib.import_module("mpo_ray.policies.cpu")
            for branch in mixture.branches:
                cpu.optimize_for_cpu(branch)
        name = "max_num_seqs" if "max_num_seqs" in inspect.signature(engine_of).parameters else "num_lanes"
        engine = engine_of(mixture, None, context=context, **{name: num})
        engine._eos_ids = ()
        return engine

    def _request(self, ids: list[int], new: int, mode: Any = None) -> Any:
        from mpo_ray.decoding.protocol import GenerationRequest, Mode, Sampling

        self._number += 1
        return GenerationRequest(f"{self._number:06}", tuple(ids), Sampling(new, seed=0), mode or Mode(log_z=False))

    def _drain(self, engine: Any, requests: list[Any]) -> list[list[int]]:
        found: dict[str, list[int]] = {request.id: [] for request in requests}
        for request in requests:
            engine.submit(request)
        while engine.has_work:
            for name, delta in engine.step():
                found[name] += delta.tokens
        return [found[request.id] for request in requests]


def _ids(num: int, seed: int) -> list[int]:
    return [100 + (seed * 7919 + place * 104729) % 40000 for place in range(num)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of the chat model")
    parser.add_argument("--before", required=True, metavar="COMMIT")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    options = parser.parse_args()
    project = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory(prefix="real-size-") as directory:
        before = Path(directory) / "before"
        git = ["git", "-C", str(project), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(before), options.before], check=True)
        try:
            artefact = write_artefact(str(Path(options.model).absolute()), Path(directory))
            roots = {"before": before, "after": project}
            compare(list(options.rows), roots, artefact, str(Path(options.model).absolute()))
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        serve_rows(*sys.argv[2:])
    else:
        main()
