"""Mixtures that vLLM can open on a CPU, requests to them, and what the explicit product of the policies answers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.loading import load_tokenizer
from mpo_ray.policies.mixture import MixtureForCausalLM
from tests.policies.test_adapters import ADAPTERS, save_adapter
from tests.tiny import TINY_SIZES, tiny_tokenizer

MARKS = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here; make test-vllm installs it"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
]
#: vLLM on a small machine without a GPU.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
TOKENIZER = tiny_tokenizer()
#: vLLM's attention on a CPU wants heads of 32.
SIZES: dict[str, Any] = {
    **TINY_SIZES,
    "vocab_size": len(TOKENIZER),
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 320,  # more than two of vLLM's pages, so that a prefix can be kept
}
#: What a family's configuration needs beside the sizes.
FURTHER: dict[str, dict[str, Any]] = {
    "gemma3_text": {"query_pre_attn_scalar": 32, "sliding_window": 16, "sliding_window_pattern": 2},
    "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 16, "final_logit_softcapping": 3.0},
    "codegen": {"rotary_dim": 16},
}
NAMES = ("helpful", "harmless", "2")
WEIGHTS = dict(zip(NAMES, (0.5, 0.3, 0.2), strict=True))
#: As requests may give them, and as they are meant; None is the artefact's own.
GIVEN: list[tuple[Any, Mapping[str, float]]] = [
    (None, WEIGHTS),
    ({"helpful": 1.0}, {"helpful": 1.0}),
    ("harmless=0.6,2=0.4", {"harmless": 0.6, "2": 0.4}),
    ([0.1, 0.2, 0.7], dict(zip(NAMES, (0.1, 0.2, 0.7), strict=True))),
]


def write_mixture(root: Path, family: str, kinds: str, **sizes: int) -> Path:
    """A mixture of three policies. kinds: `a` or `f` for each, an adapter (their ranks differ) or full weights."""

    def model(seed: int) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = AutoConfig.for_model(family, **{**SIZES, **FURTHER.get(family, {}), **sizes})
            made = AutoModelForCausalLM.from_config(config).eval()
            for name, bias in made.named_parameters():
                if name.endswith("proj.bias"):
                    bias.data.normal_()  # transformers begins with zeros, which nobody would miss
        return made

    model(0).save_pretrained(root / "reference")
    TOKENIZER.save_pretrained(root / "reference")
    tokenizer = load_tokenizer(str(root / "reference"))  # of the class that the family has
    policies = {name: root / f"policy-{name}" for name in NAMES}
    for seed, (path, kind, adapter) in enumerate(zip(policies.values(), kinds, ADAPTERS.values(), strict=True)):
        if kind == "a":
            save_adapter(path, model(0), seed, **adapter)
        else:
            model(seed + 1).save_pretrained(path)
        tokenizer.save_pretrained(path)
    write_artefact(
        root / "mixture",
        objectives=policies,
        reference=root / "reference",
        copy_reference=True,
        weights=WEIGHTS,
        fit={},
    )
    return root / "mixture"


def requests(number: int) -> list[tuple[list[int], Any, Mapping[str, float], int]]:
    """Prompts of 1 to 30 tokens, weights by turns, answers of 1 to 20 tokens: more than run at a time."""
    chance = random.Random(0)
    made = []
    for index in range(number):
        prompt = [1, *(chance.randrange(4, len(TOKENIZER)) for _ in range(chance.randrange(30)))]
        made.append((prompt, *GIVEN[index % len(GIVEN)], chance.randint(1, 20)))
    return made


def logits(model: MixtureForCausalLM, ids: list[int], weights: Mapping[str, float]) -> torch.Tensor:
    """Σ λ_k log π_k after every token, (T, V)."""
    rows = torch.tensor([[weights.get(name, 0.0) for name in NAMES]], dtype=torch.float64)
    with torch.no_grad():
        return model(torch.tensor([ids]), mixture_weights=rows).logits[0].double()
