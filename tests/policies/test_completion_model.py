"""The log-probability of a completion under a causal LM, with padding in its layers and without: the chain rule."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mpo_ray.data.tokens import collate
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.policies.ragged_attention import NAME
from tests.tiny import TINY_SIZES, next_logprobs, tiny_config, tiny_tokenizer

Sequences = list[tuple[list[int], list[int]]]
SIZES = {**TINY_SIZES, "vocab_size": 25}


def _sequences(num: int = 7) -> Sequences:
    """Prompts and completions of very different lengths, one of them empty, in no order of length."""
    rng = random.Random(0)
    draw = [([rng.randrange(3, 25) for _ in range(rng.randint(1, 9))], rng.randint(1, 20)) for _ in range(num)]
    return [(prompt, [*(rng.randrange(3, 25) for _ in range(length - 1)), 2]) for prompt, length in draw] + [([5], [])]


def _seeded(make: Callable[[], Any], *, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def _llama() -> Any:
    return _seeded(lambda: LlamaForCausalLM(tiny_config(tiny_tokenizer())))


def _lora(model: Any, **targets: Any) -> Any:
    """A LoRA that does something, on a model that may be adapted anywhere."""
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **targets))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapted.eval()


def _token_by_token(causal_lm: Any, sequences: Sequences) -> torch.Tensor:
    """Σ_t log π(y_t | x, y_<t), every term by a plain forward pass of its own prefix."""
    sums = []
    for prompt, completion in sequences:
        ids = [*prompt, *completion]
        terms = [float(next_logprobs(causal_lm, ids[:t])[ids[t]]) for t in range(len(prompt), len(ids))]
        sums.append(sum(terms))
    return torch.tensor(sums)


MODELS: dict[str, tuple[Callable[[], Any], bool]] = {
    "llama": (_llama, True),
    "mistral": (lambda: _seeded(lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None))), True),
    "qwen2": (lambda: _seeded(lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES))), True),
    "qwen3": (lambda: _seeded(lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES))), True),
    "LoRA": (lambda: _lora(_llama(), target_modules="all-linear"), True),
    "LoRA on the head": (lambda: _lora(_llama(), target_modules=["q_proj", "lm_head"]), True),
    "short window": (lambda: _seeded(lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))), False),
    "soft-capped": (
        lambda: _seeded(
            lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=4, attn_implementation="eager"))
        ),
        False,
    ),
    "eager attention": (
        lambda: _seeded(
            lambda: LlamaForCausalLM._from_config(tiny_config(tiny_tokenizer()), attn_implementation="eager")
        ),
        False,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_completions_logprob_is_the_models_own_token_by_token(name: str) -> None:
    """log π(y|x) = Σ_t log π(y_t | x, y_<t); an architecture that is not known to pack exactly is not packed."""
    make, packs = MODELS[name]
    expected = _token_by_token(make(), _sequences())
    model = CompletionModel(make())
    assert model.packs == packs
    with torch.no_grad():
        found = model(collate(_sequences(), pad_id=0))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["LoRA on the head", "soft-capped"])
def test_neither_neighbours_nor_padding_change_a_completions_logprob(name: str) -> None:
    model = CompletionModel(MODELS[name][0]())
    with torch.no_grad():
        together = model(collate(_sequences(), pad_id=0))
        alone = torch.cat([model(collate([sequence], pad_id=0)) for sequence in _sequences()])
        other_padding = model(collate(_sequences(), pad_id=7))
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(together, other_padding)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_gradients_are_those_of_the_padded_batch(checkpointing: bool) -> None:
    """∂ Σ log π / ∂ θ, activations kept or computed anew."""
    gradients = []
    for packs in (True, False):
        model = CompletionModel(_lora(_llama(), target_modules="all-linear")).train()
        model.packs = packs
        if checkpointing:
            model.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(collate(_sequences(), pad_id=0)).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 28  # two factors in each of seven linear layers, twice
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


def test_length_normalised_is_the_mean_over_the_completions_tokens() -> None:
    model = CompletionModel(_llama())
    batch = collate(_sequences(), pad_id=0)
    with torch.no_grad():
        mean = model(batch, length_normalized=True)
        torch.testing.assert_close(mean * batch.completion_mask.sum(-1), model(batch))


def test_a_model_that_packs_still_answers_padded_batches_and_saves_as_it_was_loaded(tmp_path: Path) -> None:
    plain, wrapped = _llama(), _llama()
    assert CompletionModel(wrapped).packs
    batch = collate(_sequences(), pad_id=0)
    left = {"input_ids": batch.input_ids.flip(1), "attention_mask": batch.attention_mask.flip(1)}  # as generate() pads
    with torch.no_grad():
        found, expected = wrapped(**left).logits, plain(**left).logits
        generated, as_plain = (m.generate(**left, max_new_tokens=5, do_sample=False) for m in (wrapped, plain))
    torch.testing.assert_close(found, expected)
    assert torch.equal(generated, as_plain)
    wrapped.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    reopened: PreTrainedConfig = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert reopened._attn_implementation == "sdpa"
