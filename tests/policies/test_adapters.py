"""K adapters stacked on one base: every group of rows is the policy that PEFT runs; what is not LoRA is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mpo_ray.policies.adapters import AdapterStack, repeat_rows
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.policies.loading import ModelError
from mpo_ray.records import REFERENCE
from tests.tiny import TINY_SIZES, tiny_llama, tiny_lora, tiny_tokenizer

SIZES = {**TINY_SIZES, "vocab_size": 25}
ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),  # its q, k and v have biases
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}
#: Ranks, scalings and layers that differ from adapter to adapter.
ADAPTERS: dict[str, dict[str, Any]] = {
    "small": {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"},
    "stabilised": {"r": 6, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterned": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["v_proj", "o_proj", "gate_proj"],
        "layers_to_transform": [1],
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"o_proj": 16},
    },
}
IDS = torch.tensor([[1, 8, 9, 10, 11], [1, 12, 5, 6, 7]])


def base_model(architecture: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ARCHITECTURES[architecture]().eval()


def save_adapter(directory: Path, base: PreTrainedModel, seed: int, **config: Any) -> Path:
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory)
    return directory


def save_adapters(root: Path, architecture: str) -> dict[str, Path]:
    """All of ADAPTERS, on one base."""
    return {
        name: save_adapter(root / name, base_model(architecture), seed, **config)
        for seed, (name, config) in enumerate(ADAPTERS.items())
    }


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def adapters(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_adapters(tmp_path_factory.mktemp(architecture), architecture)


@pytest.fixture(scope="module")
def stack(architecture: str, adapters: dict[str, Path]) -> AdapterStack:
    return AdapterStack(base_model(architecture), adapters)


@pytest.fixture(scope="module")
def separate(architecture: str, adapters: dict[str, Path]) -> dict[str, torch.Tensor]:
    """The logits of the reference and of each policy, every one a PEFT model by itself."""
    with torch.no_grad():
        logits = {REFERENCE: base_model(architecture)(IDS).logits}
        for name, path in adapters.items():
            logits[name] = PeftModel.from_pretrained(base_model(architecture), str(path))(IDS).logits
    return logits


@pytest.mark.parametrize(
    "names",
    [
        ["small", "stabilised", "patterned"],
        [REFERENCE, "small", "stabilised", "patterned"],
        [REFERENCE, "small", "patterned"],
        ["patterned", "small"],
        ["stabilised"],
        [REFERENCE],
    ],
    ids="+".join,
)
def test_stacked_rows_are_the_separate_models(
    names: list[str], stack: AdapterStack, separate: dict[str, torch.Tensor]
) -> None:
    """Group g of the rows has the logits of policy g alone, for any subset, in any order, the reference among them."""
    logits = stack(names, input_ids=repeat_rows(IDS, len(names))).logits.unflatten(0, (len(names), -1))
    for name, found in zip(names, logits, strict=True):
        torch.testing.assert_close(found, separate[name], atol=1e-5, rtol=1e-5)


def test_the_policies_differ_or_the_test_above_shows_nothing(separate: dict[str, torch.Tensor]) -> None:
    values = list(separate.values())
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(values) for b in values[:i])


def test_layers_computed_together_may_be_given_different_inputs(
    architecture: str, stack: AdapterStack, adapters: dict[str, Path]
) -> None:
    """Queries, keys and values are one product where they have one input; each has its own where they do not."""
    peft = PeftModel.from_pretrained(base_model(architecture), str(adapters["small"]))
    attention = peft.get_base_model().model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 3, attention.q_proj.in_features, generator=generator) for _ in range(2)]
    with stack.running(["small"]) as base, torch.no_grad():
        stacked = base.model.layers[0].self_attn
        for name, given in [("q_proj", 0), ("k_proj", 1), ("v_proj", 0), ("q_proj", 1), ("v_proj", 1)]:
            expected = getattr(attention, name)(inputs[given])
            torch.testing.assert_close(getattr(stacked, name)(inputs[given]), expected, atol=1e-5, rtol=1e-5)


def test_outside_a_call_the_base_is_the_reference(stack: AdapterStack, separate: dict[str, torch.Tensor]) -> None:
    stack(["small"], input_ids=IDS)
    torch.testing.assert_close(stack.base(IDS).logits, separate[REFERENCE])


def test_threads_run_different_policies_of_one_stack(stack: AdapterStack, separate: dict[str, torch.Tensor]) -> None:
    """The groups belong to the thread: while one thread is inside a policy, another runs its own."""
    wrong: list[str] = []
    inside = threading.Barrier(2)

    def work(name: str) -> None:
        with stack.running([name]) as model:
            for _ in range(5):
                inside.wait()
                if not torch.allclose(model(IDS).logits, separate[name], atol=1e-4):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("small", "patterned")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("names", [[], ["small", "small"], ["small", REFERENCE]])
def test_groups_are_named_once_and_the_reference_first(names: list[str], stack: AdapterStack) -> None:
    with pytest.raises(ValueError, match="name each policy once, and `reference` first"):
        stack(names, input_ids=IDS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), tiny_tokenizer(), seed=0)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"use_dora": True}, r"the adapter is DoRA \(use_dora\)"),
        ({"modules_to_save": ["lm_head"]}, r"whole copies of lm_head \(modules_to_save\)"),
        ({"bias": "lora_only"}, "trained biases .bias: 'lora_only'"),
        ({"target_modules": ["embed_tokens"]}, "changes the embeddings or the output head"),
        ({"target_modules": ["q_proj", "lm_head"]}, "changes the embeddings or the output head"),
        ({"lora_bias": True}, "the adapter sets lora_bias: True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore")  # PEFT's own about saving embeddings
def test_what_is_more_than_lora_on_linear_layers_is_refused_by_name(
    config: dict[str, Any], complaint: str, base: Path, tmp_path: Path
) -> None:
    made = {"r": 2, "target_modules": ["q_proj"], **config}
    adapter = save_adapter(tmp_path / "adapter", LlamaForCausalLM.from_pretrained(base), seed=1, **made)
    with pytest.raises(ModelError, match=complaint) as error:
        Ensemble(str(base), {"odd": str(adapter)})
    assert str(adapter) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa', which changes the base's weights"),
        ({"some_new_variant": 3}, "sets some_new_variant: 3, which stacked adapters do not know"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unknown_settings_are_refused_before_any_weights_are_read(
    changes: dict[str, Any], complaint: str, base: Path, tmp_path: Path
) -> None:
    adapter = tiny_lora(tmp_path / "adapter", base, seed=1)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ModelError, match=complaint):
        Ensemble(str(tmp_path / "no such reference"), {"odd": str(adapter)})


def test_an_adapter_of_transposed_layers_is_stacked(tmp_path: Path) -> None:
    """GPT-2's layers are Conv1D, of which PEFT writes `fan_in_fan_out`: log π as PEFT has it."""
    sizes = {"vocab_size": 25, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}

    def gpt() -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()

    adapter = save_adapter(tmp_path, gpt(), seed=1, r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    expected = PeftModel.from_pretrained(gpt(), str(adapter))(IDS).logits
    found = AdapterStack(gpt(), {"one": adapter})([REFERENCE, "one"], input_ids=repeat_rows(IDS, 2)).logits
    torch.testing.assert_close(found[len(IDS) :], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[: len(IDS)], gpt()(IDS).logits, atol=1e-5, rtol=1e-5)


def test_layers_that_flatten_their_rows_have_the_policy_of_each_token(tmp_path: Path) -> None:
    """OPT gives fc1 (B·T, d): with groups of 5 and 3 tokens in one row, each token's logits are its own policy's."""

    def opt() -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, init_std=0.3)
            return OPTForCausalLM(config).eval()

    paths = {name: save_adapter(tmp_path / name, opt(), n, r=2, target_modules=["fc1"]) for n, name in enumerate("ab")}
    stack = AdapterStack(opt(), paths)
    inputs = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    layers = {
        name: PeftModel.from_pretrained(opt(), str(path)).get_base_model().model.decoder.layers[0].fc1
        for name, path in paths.items()
    }
    expected = torch.cat([layers["a"](inputs[:5]), layers["b"](inputs[5:])])
    with stack.running(["a", "b"], [5, 3]) as base:
        found = base.model.decoder.layers[0].fc1
        torch.testing.assert_close(found(inputs), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found(inputs[None])[0], expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_another_base_or_cut_short_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = tiny_lora(tmp_path / "adapter", base, seed=1)
    for changes, complaint in (
        ({"hidden_size": 64}, "does not fit the reference model: '.*down_proj' is 64 → 64, the adapter's 64 → 32"),
        ({"num_hidden_layers": 1}, r"does not fit the reference model: it adapts 'model\.layers\.1.*does not have"),
    ):
        other = tiny_llama(tmp_path / next(iter(changes)), tiny_tokenizer(), seed=0, **changes)
        with pytest.raises(ModelError, match=complaint):
            Ensemble(str(other), {"odd": str(adapter)})
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if "layers.1.mlp.up_proj" not in key}
    save_file(kept, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"should adapt 'model\.layers\.1\.mlp\.up_proj', .* has no tensors for it"):
        Ensemble(str(base), {"odd": str(adapter)})
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 3)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="factors of 'x' are not a pair of one rank"):
        Ensemble(str(base), {"odd": str(adapter)})


def test_a_step_in_lower_precision_stays_in_it(base: Path, tmp_path: Path) -> None:
    adapter = tiny_lora(tmp_path / "adapter", base, seed=1)
    stack = AdapterStack(LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval(), {"one": adapter})
    assert stack(["one"], input_ids=IDS).logits.dtype == torch.bfloat16
