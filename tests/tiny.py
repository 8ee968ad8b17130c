"""Tiny real models for tests: a word-level tokenizer, a two-layer Llama, a LoRA adapter that does something."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = tuple("the a film was good bad short long and very I liked it not at all plot acting".split())  # noqa: SIM905
#: The shape of a two-layer model of any architecture, for its configuration.
TINY_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} {{ message['role'] }} {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)


def tiny_tokenizer(words: Sequence[str] = WORDS, chat_template: bool = True) -> PreTrainedTokenizerFast:
    """One token per word, after `<pad> <s> </s> <unk>` and the chat roles; `<s>` is put in front."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", "system", *words]
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(tokenizer: PreTrainedTokenizerFast, **changes: object) -> LlamaConfig:
    values: dict[str, object] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,  # far from uniform, so that a wrong product is seen
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaConfig(**{**values, **changes})


def tiny_llama(directory: Path, tokenizer: PreTrainedTokenizerFast, seed: int, **changes: object) -> Path:
    """Save a random Llama with its tokenizer; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_config(tokenizer, **changes))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tiny_reward(directory: Path, tokenizer: PreTrainedTokenizerFast, seed: int, num_labels: int = 1) -> Path:
    """Save a random sequence classifier with its tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=num_labels))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tiny_lora(
    directory: Path,
    base: Path,
    seed: int,
    tokenizer: PreTrainedTokenizerFast | None = None,
    target_modules: str | list[str] = "all-linear",
) -> Path:
    """Save a LoRA adapter of the model at `base`, both factors random, with a tokenizer."""
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=8, target_modules=target_modules, task_type="CAUSAL_LM"),
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory)
    (tokenizer or PreTrainedTokenizerFast.from_pretrained(base)).save_pretrained(directory)
    return directory


def next_logprobs(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """log π(v | ids), (V,), nats, float64, by one plain forward pass."""
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([list(ids)])).logits[0, -1].double(), dim=-1)
