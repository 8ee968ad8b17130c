"""Which layers a run's own LoRA adapts: those that a mixture can stack later, and refused by name what it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mpo_ray.policies.loading import ModelError
from mpo_ray.policies.lora_file import read_lora
from mpo_ray.policies.lora_targets import lora_config, lora_targets
from tests.tiny import TINY_SIZES

SIZES: dict[str, Any] = {**TINY_SIZES, "vocab_size": 40}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT: dict[str, Any] = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
GPT |= {"bos_token_id": 1, "eos_token_id": 2}
ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
MAKE: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3 moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS)),
    "qwen2 moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=32)),
    "phi moe": lambda: PhimoeForCausalLM(PhimoeConfig(**SIZES, num_local_experts=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT)),
    "mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(**{**SIZES, "num_heads": 8}, state_size=8, n_groups=2)),
}


def on_meta(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        return MAKE[family]()


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ["down_proj", "gate_proj", *ATTENTION[:3], "up_proj", "v_proj"]),
        ("mixtral", ATTENTION),
        ("qwen3 moe", ATTENTION),
        ("phi moe", ATTENTION),  # its router is a Linear that gives more than a product
        ("gpt2", ["c_attn", "c_fc", "c_proj"]),
        ("mamba2", ["in_proj"]),
    ],
)
def test_all_linear_is_what_a_mixture_can_stack(family: str, expected: list[str], tmp_path: Path) -> None:
    """The adapter that PEFT saves from it is one that the product reads back, without tensors of experts."""
    assert sorted(lora_targets(on_meta(family), "all-linear")) == sorted(expected)
    model = MAKE[family]()
    get_peft_model(
        model, lora_config(model, rank=2, alpha=2.0, dropout=0.0, target_modules="all-linear")
    ).save_pretrained(tmp_path)
    assert {name.rpartition(".")[2] for name in read_lora(tmp_path).factors} == {*expected}


def test_shared_experts_are_adapted_where_peft_does_not_take_them_for_experts() -> None:
    assert "shared_expert_gate" in lora_targets(on_meta("qwen2 moe"), "all-linear")


@pytest.mark.parametrize(
    ("family", "wanted", "complaint"),
    [
        ("llama", ["query_projection"], "'query_projection' is the name of no layer .*Did you mean q_proj"),
        ("llama", ["q_proj", "v_porj"], "'v_porj' is the name of no layer .*Did you mean v_proj"),
        ("llama", r"model\.layers\.7\..*", "is the name of no layer .* Layers that can be: down_proj, gate_proj"),
        ("llama", ["q_proj", "lm_head"], "'lm_head' .* the output head, which the policies of a mixture share"),
        ("tied llama", ["lm_head"], "'lm_head' .* the output head"),
        ("llama", ["embed_tokens"], "'embed_tokens' .* the embeddings"),
        ("llama", ["input_layernorm"], "it is a LlamaRMSNorm, and adapters are added to linear layers"),
        ("mixtral", ["q_proj", "w1"], "'w1' .* weights of the experts"),
        ("qwen3 moe", ["down_proj"], "'down_proj' .* weights of the experts"),
        ("phi moe", ["router"], "'router' .* PhimoeTopKRouter"),
        ("mamba2", ["out_proj"], "'out_proj' .* without calling the layer"),
    ],
)
def test_other_targets_are_refused_by_name_before_training(family: str, wanted: Any, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        lora_targets(on_meta(family), wanted)


@pytest.mark.parametrize("wanted", [["q_proj", "v_proj"], ["layers.1.mlp.up_proj"], r".*self_attn\.[qk]_proj"])
def test_targets_that_fit_stay_what_they_are(wanted: Any) -> None:
    assert lora_targets(on_meta("llama"), wanted) == wanted
