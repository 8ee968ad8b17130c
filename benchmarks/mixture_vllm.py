"""What a mixture costs in vLLM: against one plain model in vLLM, and against this package's own engine.

    python benchmarks/mixture_vllm.py [--requests 1 8 32] [--steps 40] [--rounds 3] [--threads 1]

Needs vLLM (`make test-vllm` makes an environment with its build for CPUs, .venv-vllm). A Llama with random weights
(12 layers of d = 576, the shape of benchmarks/decoding.py) and K = 3: LoRA policies of rank 16 on one base, and
policies with full weights. All sides are in this process and decode the same prompts, one round of each after the
other. A figure is the median over rounds of the time of a step, a token for each
request: of an answer of `steps` + 1 tokens less that of one token. Weights are what parameters and buffers hold; a
linear layer's by its sizes, because on a CPU vLLM lays them out anew elsewhere. Nothing is written.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

PROMPT_TOKENS = 32
#: Seconds of a step with these prompts.
Side = Callable[[Sequence[Sequence[int]], int], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=40, help="tokens of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, for each side")
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    warnings.filterwarnings("ignore")
    measure(options)


def measure(options: argparse.Namespace) -> None:
    import torch
    import transformers
    from decoding import WEIGHTS, engine_side, mixture_of, open_model, random_adapters, random_model

    from mpo_ray.policies.artefact import write_artefact
    from mpo_ray.policies.loading import load_tokenizer
    from mpo_ray.policies.scratch import write_scratch_model

    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        words = [f"w{number}" for number in range(49146)]
        write_scratch_model(root / "words", words, hidden_size=8, num_layers=1, context=512, seed=0)
        tokenizer = load_tokenizer(str(root / "words"))
        shape = {"vocab_size": len(tokenizer), "num_hidden_layers": options.layers}
        base = random_model("cpu", root / "base", **shape)
        adapters = random_adapters(base, root / "adapters")
        full = {name: random_model("cpu", root / f"full-{name}", **shape) for name in WEIGHTS}
        for path in (base, *adapters.values(), *full.values()):
            tokenizer.save_pretrained(path)
        artefacts = {}
        for kind, policies in (("adapters", adapters), ("full weights", full)):
            artefacts[kind] = root / kind.replace(" ", "-")
            write_artefact(
                artefacts[kind], objectives=policies, reference=base, copy_reference=True, weights=WEIGHTS, fit={}
            )
        most = max(options.requests)
        opened = {"one model": base, **{f"mixture of {kind}": path for kind, path in artefacts.items()}}
        engines = {name: open_vllm(path, most) for name, path in opened.items()}
        sides: dict[str, Side] = {f"{name}, vLLM": vllm_side(llm) for name, llm in engines.items()}
        ours = mixture_of(open_model(base), adapters)
        sides["mixture of adapters, our engine"] = engine_side(ours, WEIGHTS, most, log_z=False)

        print(f"{options.layers} layers, d = 576, random weights: K = 3, rank 16, {options.threads} thread(s) a side")
        weights = {name: count_weights_of(llm) for name, llm in engines.items()}
        for name, size in weights.items():
            print(f"  weights, {name}: {size / 2**20:.1f} MiB, {size / weights['one model']:.2f} times one model's")
        generator = torch.Generator().manual_seed(0)
        for number in options.requests:
            prompts = torch.randint(6, len(tokenizer), (number, PROMPT_TOKENS), generator=generator).tolist()
            compare(sides, prompts, options)


def compare(sides: dict[str, Side], prompts: Sequence[Sequence[int]], options: argparse.Namespace) -> None:
    from tqdm import tqdm

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side(prompts, 4)
    for _ in tqdm(range(options.rounds), desc=f"{len(prompts)} requests", leave=False):
        for name, side in sides.items():
            seconds[name].append(side(prompts, options.steps))
    print(f"{len(prompts)} request(s)")
    for name, found in seconds.items():
        print(f"  {name:<32} {1000 * median(found):8.2f} ms a step {len(prompts) / median(found):8.0f} tokens/s")
    for first, second in (
        ("mixture of adapters, vLLM", "one model, vLLM"),
        ("mixture of full weights, vLLM", "one model, vLLM"),
        ("mixture of adapters, our engine", "mixture of adapters, vLLM"),
    ):
        ratio = median(a / b for a, b in zip(seconds[first], seconds[second], strict=True))
        print(f"  {first} / {second}: {ratio:.2f}")


def open_vllm(model: Path, num_requests: int) -> Any:
    from vllm import LLM

    return LLM(
        str(model), dtype="float32", enforce_eager=True, max_num_seqs=num_requests, max_model_len=512,
        enable_prefix_caching=False, skip_tokenizer_init=True, distributed_executor_backend="uni",
    )  # fmt: skip


def vllm_side(llm: Any) -> Side:
    from vllm import SamplingParams

    def one_round(prompts: Sequence[Sequence[int]], steps: int) -> float:
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        seconds = []
        for num in (1, steps + 1):
            sampling = SamplingParams(max_tokens=num, ignore_eos=True, detokenize=False)
            begin = time.perf_counter()
            llm.generate(asked, sampling, use_tqdm=False)
            seconds.append(time.perf_counter() - begin)
        return (seconds[1] - seconds[0]) / steps

    return one_round


def count_weights(model: Any) -> int:
    """Bytes of all weights, shared ones once."""
    from vllm.model_executor.layers.linear import LinearBase

    linear = [module for module in model.modules() if isinstance(module, LinearBase)]
    counted = {id(tensor) for module in linear for tensor in module.parameters()}
    others = {
        tensor.data_ptr(): tensor.nbytes
        for tensor in (*model.parameters(), *model.buffers())
        if id(tensor) not in counted and tensor.device.type != "meta"
    }
    return sum(others.values()) + sum(4 * module.input_size * module.output_size for module in linear)


def count_weights_of(llm: Any) -> int:
    size: int
    [size] = llm.apply_model(count_weights)
    return size


if __name__ == "__main__":
    main()
