"""What decoding a mixture costs, against one plain model, a loop over adapters, and transformers' `generate`.

    python benchmarks/decoding.py [--requests 1 16] [--steps 48] [--rounds 5] [--threads 1]

Two shapes: the testbed's model (where the shared material is) and a Llama with random weights; K = 3 LoRA adapters of
rank 16 with random factors. On the CPU the latter has 12 layers of SmolLM-135M's shape (d = 576); on a GPU it has the
shape of a 1B model, in bfloat16 (`--shape 8b` for 8B). Every side decodes the same prompts, one round of each after
the other; one model is also given K times the requests, which is as many rows as the mixture computes. A figure is
the median of the time of a step, a token for each request, over rounds. Nothing is written.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from shared_material import find_testbed
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from mpo_ray.decoding.engine import MixtureEngine
from mpo_ray.decoding.protocol import GenerationRequest, Mode, Sampling
from mpo_ray.decoding.runner import MixtureRunner
from mpo_ray.policies.adapters import AdapterStack
from mpo_ray.policies.cpu import optimize_for_cpu
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.policies.mixture_config import MixtureConfig

NAMES = ("first", "second", "third")
WEIGHTS = dict(zip(NAMES, (0.5, 0.3, 0.2), strict=True))
PROMPT_TOKENS = 32
SHAPES = {
    "cpu": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 9,
            "num_key_value_heads": 3, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
#: Makes one round: the seconds per token of all requests together.
Side = Callable[[Sequence[Sequence[int]], int], float]


def random_model(shape: str, directory: Path, **other: int) -> Path:
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = LlamaConfig(**{**SHAPES[shape], **other}, max_position_embeddings=2048)
        model = LlamaForCausalLM(config).to(precision())
    model.save_pretrained(directory)
    return directory


def precision() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_model(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=precision()).to(device()).eval()


def random_adapters(base: Path, directory: Path) -> dict[str, Path]:
    """K adapters on every linear layer, with both factors random."""
    paths = {}
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=precision()),
            LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.02)
        paths[name] = directory / name
        model.save_pretrained(paths[name])
    return paths


def engine_side(mixture: MixtureForCausalLM, weights: Mapping[str, float], max_num_seqs: int, *, log_z: bool) -> Side:
    """Decoding by the engine; the time begins when all prompts are computed."""
    runner = MixtureRunner(mixture, max_num_seqs=max_num_seqs, context=512)
    engine = MixtureEngine(runner, weights, eos_ids=[], tokenizer=None)

    def one_round(prompts: Sequence[Sequence[int]], steps: int) -> float:
        for number, prompt in enumerate(prompts):
            sampling = Sampling(steps + 1 + len(prompts), temperature=1.0, seed=number)
            engine.submit(GenerationRequest(str(number), tuple(prompt), sampling, Mode(log_z=log_z)))
        told: set[str] = set()
        while len(told) < len(prompts):
            told |= {request for request, _ in engine.step()}
        begin = time.perf_counter()
        for _ in range(steps):
            engine.step()
        synchronise()
        seconds = time.perf_counter() - begin
        for number in range(len(prompts)):
            engine.abort(str(number))
        return seconds / steps

    return one_round


def loop_side(base: Path, adapters: Mapping[str, Path]) -> Side:
    """As public code decodes a mixture: `set_adapter` for each policy, one after the other, a cache for each."""
    model: Any = PeftModel.from_pretrained(open_model(base), str(adapters[NAMES[0]]), NAMES[0])
    for name in NAMES[1:]:
        model.load_adapter(str(adapters[name]), name)
    model = model.to(device()).eval()

    @torch.inference_mode()
    def one_round(prompts: Sequence[Sequence[int]], steps: int) -> float:
        caches = {name: DynamicCache(config=model.config) for name in NAMES}
        ids = torch.tensor([list(prompt) for prompt in prompts], device=device())
        begin = 0.0
        for step in range(steps + 1):
            if step == 1:
                synchronise()
                begin = time.perf_counter()
            mixed = torch.zeros((), device=device())
            for name in NAMES:
                model.set_adapter(name)
                logits = model(input_ids=ids, past_key_values=caches[name], use_cache=True, logits_to_keep=1).logits
                mixed = mixed + WEIGHTS[name] * logits[:, -1].float().log_softmax(-1)
            ids = torch.multinomial(mixed.softmax(-1), 1)
        synchronise()
        return (time.perf_counter() - begin) / steps

    return one_round


def generate_side(base: Path) -> Side:
    """One plain model by transformers' own `generate`; its prompt's pass is taken off."""
    model = open_model(base)

    def one_round(prompts: Sequence[Sequence[int]], steps: int) -> float:
        ids = torch.tensor([list(prompt) for prompt in prompts], device=device())
        seconds = []
        for num in (1, steps + 1):
            begin = time.perf_counter()
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=num,
                min_new_tokens=num, pad_token_id=0,
            )  # fmt: skip
            synchronise()
            seconds.append(time.perf_counter() - begin)
        return (seconds[1] - seconds[0]) / steps

    return one_round


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def mixture_of(model: Any, adapters: Mapping[str, Path]) -> MixtureForCausalLM:
    """K adapters on the model, or, without adapters, the model as the only policy."""
    names = list(adapters) or ["plain"]
    weights = {name: WEIGHTS.get(name, 1.0) for name in names}
    config = MixtureConfig(names, weights, vocab_size=model.config.vocab_size, max_position_embeddings=512)
    stack = AdapterStack(model, adapters).to(device()) if adapters else None
    optimize_for_cpu(stack or model)
    return MixtureForCausalLM(config, adapters=stack, full={} if adapters else {"plain": model}).eval()


def measure(base: Path, adapters: Mapping[str, Path], num_requests: int, *, steps: int, rounds: int) -> None:
    most = num_requests
    plain, crowded = (mixture_of(open_model(base), {}) for _ in range(2))
    mixture, measured = (mixture_of(open_model(base), adapters) for _ in range(2))
    crowd = engine_side(crowded, {"plain": 1.0}, len(NAMES) * most, log_z=False)
    sides: dict[str, Side] = {
        "one model, engine": engine_side(plain, {"plain": 1.0}, most, log_z=False),
        "one model, K x requests": lambda prompts, steps: crowd([*prompts] * len(NAMES), steps),
        "mixture, engine": engine_side(mixture, WEIGHTS, most, log_z=False),
        "mixture, engine, log Z": engine_side(measured, WEIGHTS, most, log_z=True),
        "mixture, set_adapter": loop_side(base, adapters),
        "one model, generate": generate_side(base),
    }
    vocabulary = plain.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, vocabulary, (num_requests, PROMPT_TOKENS), generator=generator).tolist()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side(prompts, 4)
    for _ in tqdm(range(rounds), desc=f"{num_requests} requests", leave=False):
        for name, side in sides.items():
            seconds[name].append(side(prompts, steps))
    print(f"{num_requests} requests" if num_requests > 1 else "1 request")
    for name, found in seconds.items():
        print(f"  {name:<24} {1000 * median(found):8.2f} ms a step")
    for first, second in (
        ("mixture, engine", "one model, engine"),
        ("mixture, engine", "one model, K x requests"),
        ("mixture, engine, log Z", "one model, engine"),
        ("mixture, set_adapter", "mixture, engine"),
        ("one model, generate", "one model, engine"),
    ):
        ratio = median(a / b for a, b in zip(seconds[first], seconds[second], strict=True))
        print(f"  {first} / {second}: {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32, 128] if on_gpu else [1, 16])
    parser.add_argument("--shape", choices=list(SHAPES), default="1b" if on_gpu else "cpu")
    parser.add_argument("--steps", type=int, default=48, help="tokens of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; a Ray worker has 1 unless told otherwise")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        bases = {f"random weights, shape {arguments.shape}": random_model(arguments.shape, root / "base")}
        if (testbed := find_testbed()) is not None:
            bases["testbed"] = testbed / "base"
        for number, (title, base) in enumerate(bases.items()):
            adapters = random_adapters(base, root / f"adapters{number}")
            print(f"\n{title}: K = {len(NAMES)}, rank 16, {torch.get_num_threads()} threads, {device()}")
            for num_requests in arguments.requests:
                measure(base, adapters, num_requests, steps=arguments.steps, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
