"""Adapters as users have them: each is served as PEFT loads it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mpo_ray.policies.loading import is_adapter
from mpo_ray.policies.mixture import MixtureForCausalLM
from tests.policies.adapters_given import (
    MOE,
    adapter,
    as_peft,
    assert_mixture,
    change,
    logprobs,
    mix,
    rewrite,
)
from tests.tiny import tiny_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore")]  # PEFT's own, of odd adapters


#: Adapters that are stacked as they are.
STACKED: dict[str, dict[str, Any]] = {
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {r"^model\.layers\.0\..*q_proj": 2}, "alpha_pattern": {r"layers\.1\..*v_proj": 12}},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "fan in, fan out": {"fan_in_fan_out": True},
}
#: Adapters that are more than factors of linear layers, kept with full weights; how the line about them calls them.
MERGED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True, "use_rslora": True, "target_modules": "all-linear"}, "DoRA adapter"),
    "whole head": ({"modules_to_save": ["lm_head"]}, "modules_to_save: ..lm_head"),
    "whole embeddings": ({"modules_to_save": ["embed_tokens"]}, "modules_to_save: ..embed_tokens"),
    "both whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, "modules_to_save"),
    "whole norm": ({"modules_to_save": ["norm"]}, "modules_to_save: ..norm"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "other layers than linear ones"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "other layers than linear ones"),
    "both ends": ({"target_modules": ["embed_tokens", "lm_head"]}, "other layers than linear ones"),
    "ends tied": (
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        "other layers than linear ones",
    ),
    "tokens": ({"trainable_token_indices": [3, 9, 12]}, "rows of single tokens"),
    "biases": ({"bias": "all"}, "with biases"),
    "bias of B": ({"target_modules": ["q_proj"], "lora_bias": True}, "with biases"),
    "pissa": ({"init_lora_weights": "pissa"}, r"changes the reference's weights first .pissa"),
    "olora": ({"init_lora_weights": "olora"}, r"changes the reference's weights first .olora"),
}


@pytest.mark.parametrize("config", STACKED.values(), ids=STACKED)
def test_a_plain_adapter_is_stacked(config: dict[str, Any], bases: dict[str, Path], tmp_path: Path) -> None:
    base, plain = bases["untied"], bases["plain_untied"]
    odd = adapter(tmp_path / "odd", base, **config)
    change(odd, fan_in_fan_out=config.get("fan_in_fan_out", False))  # PEFT has set it right already
    told = mix(tmp_path / "mixed", {"odd": odd, "plain": plain}, base)
    assert not told
    assert is_adapter(tmp_path / "mixed/policies/odd")
    assert_mixture(tmp_path / "mixed", as_peft(base, odd), as_peft(base, plain))


@pytest.mark.parametrize("config", MERGED.values(), ids=MERGED)
def test_what_cannot_be_stacked_is_merged_as_peft_computes_it(
    config: tuple[dict[str, Any], str], bases: dict[str, Path], tmp_path: Path
) -> None:
    """log π of the artefact is that of `PeftModel.from_pretrained`, also where embeddings and output layer are one."""
    ends = {"embed_tokens", "lm_head"} & {*config[0].get("modules_to_save", []), *config[0].get("target_modules", [])}
    for kind in ("tied", "untied") if ends or "trainable_token_indices" in config[0] else ("untied",):
        base, plain = bases[kind], bases[f"plain_{kind}"]
        odd = adapter(tmp_path / f"odd {kind}", base, **config[0])
        [line] = mix(tmp_path / kind, {"odd": odd, "plain": plain}, base)
        assert re.match(f"policy 'odd', an? .*{config[1]}.* is merged into the reference .* MiB of memory", line)
        assert not is_adapter(tmp_path / kind / "policies/odd")
        assert_mixture(tmp_path / kind, as_peft(base, odd), as_peft(base, plain))


def test_a_converted_pissa_adapter_is_a_plain_one(bases: dict[str, Path], tmp_path: Path) -> None:
    """Saved with the adapter that it began as, PEFT writes a LoRA of twice the rank, of the unchanged base."""
    base, plain = bases["untied"], bases["plain_untied"]
    start = get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"),
    )
    start.peft_config["default"].init_lora_weights = True
    start.save_pretrained(tmp_path / "start")
    start.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in start.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1
    trained = logprobs(start)
    start.save_pretrained(tmp_path / "odd", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert not mix(tmp_path / "mixed", {"odd": tmp_path / "odd", "plain": plain}, base)
    assert_mixture(tmp_path / "mixed", trained, as_peft(base, plain))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_in_half_precision_is_what_its_file_says(
    dtype: torch.dtype, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, plain = bases["untied"], bases["plain_untied"]
    odd = adapter(tmp_path / "odd", base)
    rewrite(odd / "adapter_model.safetensors", lambda state: {k: v.to(dtype) for k, v in state.items()})
    mix(tmp_path / "mixed", {"odd": odd, "plain": plain}, base)
    assert_mixture(tmp_path / "mixed", as_peft(base, odd), as_peft(base, plain))


#: Mixture-of-experts models by the names that transformers 4 gave their experts' layers: gate, up, down.
EXPERTS: dict[str, tuple[Callable[[], PreTrainedModel], str, tuple[str, str, str]]] = {
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**MOE, num_local_experts=4, num_experts_per_tok=2)),
        "block_sparse_moe.experts",
        ("w1", "w3", "w2"),
    ),
    "qwen3_moe": (
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**MOE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
        ),
        "mlp.experts",
        ("gate_proj", "up_proj", "down_proj"),
    ),
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_one_lora_for_each_expert_is_what_transformers_4_meant(kind: str, tmp_path: Path) -> None:
    """Each expert's weights gain its own s B A, by hand; transformers 5 keeps all experts in one tensor."""
    make, experts, (gate, up, down) = EXPERTS[kind]
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    tensors: dict[str, Tensor] = {}
    updates: dict[tuple[int, int, str], Tensor] = {}
    for layer, expert, name in product(range(2), range(4), (gate, up, down)):
        inputs, outputs = (64, 32) if name == down else (32, 64)
        a, b = 0.3 * torch.randn(4, inputs), 0.3 * torch.randn(outputs, 4)
        key = f"base_model.model.model.layers.{layer}.{experts}.{expert}.{name}"
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        updates[layer, expert, name] = 2 * b @ a
    (tmp_path / "odd").mkdir()
    save_file(tensors, tmp_path / "odd" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    text = json.dumps({**settings, "target_modules": [gate, up, down]})
    (tmp_path / "odd" / "adapter_config.json").write_text(text)
    mix(tmp_path / "mixed", {"odd": tmp_path / "odd"}, tmp_path / "base")
    with torch.no_grad():
        for layer, expert in product(range(2), range(4)):
            fused = model.model.layers[layer].mlp.experts
            both = torch.cat([updates[layer, expert, gate], updates[layer, expert, up]])
            fused.gate_up_proj[expert] += both
            fused.down_proj[expert] += updates[layer, expert, down]
    found = MixtureForCausalLM.from_pretrained(tmp_path / "mixed")
    torch.testing.assert_close(logprobs(found), logprobs(model), atol=1e-5, rtol=0)
