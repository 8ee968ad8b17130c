"""An untrained policy is its reference: every log-ratio is 0, and the first DPO loss is log 2."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers import AutoModelForCausalLM as Auto

from mpo_ray.cluster.trainable import load_trainable
from mpo_ray.config_training import ConstrainedTraining, PolicyTraining, SupervisedTraining, Training
from mpo_ray.data.tokens import collate
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.policies.dropout import config_without_dropout, restore_dropout
from mpo_ray.policies.loading import load_model
from mpo_ray.training.preference import Pair, preference_loss
from tests.tiny import TINY_SIZES

# PEFT says so of GPT-2's layers, whose weights lie transposed, and sets it itself.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")

SIZES = {key: TINY_SIZES[key] for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")} | {
    "vocab_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Each with dropout where its code looks for it: in modules, in attributes, in the configuration during the pass.
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=32, n_positions=64, eos_token_id=2, bos_token_id=1),
    "llama": LlamaConfig(**{**TINY_SIZES, "vocab_size": 32, "attention_dropout": 0.3}),
    "qwen2": Qwen2Config(**{**TINY_SIZES, "vocab_size": 32, "attention_dropout": 0.3}),
    "falcon": FalconConfig(**SIZES, hidden_dropout=0.3, attention_dropout=0.3),
    "opt": OPTConfig(
        **SIZES, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.3, layerdrop=0.3
    ),
}
PAIRS = [([1, 8, 9], [10, 11, 2], [12, 2]), ([1, 9], [13, 2], [14, 15, 16, 7, 7, 7, 9, 2])]


@pytest.fixture(scope="module", params=list(CONFIGS))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Auto.from_config(CONFIGS[request.param]).save_pretrained(directory)
    return str(directory)


def first_loss(base: str, training: PolicyTraining) -> float:
    """The loss of the first forward pass, in training mode, against log-probabilities of the reference."""
    reference = CompletionModel(load_model(base, precision=training.precision))
    with torch.no_grad():
        found = [[float(logprob(reference, prompt, ids)) for ids in sides] for prompt, *sides in PAIRS]
    pairs = [Pair(*ids, *logprobs) for ids, logprobs in zip(PAIRS, found, strict=True)]
    how: Any = {"loss": "dpo", "beta": 0.5, "length_normalized": False, "pad_id": 0, "device": "cpu"}
    policy = CompletionModel(load_trainable(base, training, seed=0)).train()
    return float(preference_loss(policy, pairs, **how).losses.mean().detach())


def logprob(model: CompletionModel, prompt: list[int], ids: list[int]) -> torch.Tensor:
    return model(collate([(prompt, ids)], pad_id=0))[0]


def policy_training(**changes: Any) -> PolicyTraining:
    return PolicyTraining.model_validate(changes)


@pytest.mark.parametrize("lora", [{"rank": 4, "target_modules": "all-linear"}, None])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 5e-2)])
def test_the_first_dpo_loss_is_log_2(base: str, lora: Any, precision: str, tolerance: float) -> None:
    loss = first_loss(base, policy_training(precision=precision, lora=lora))
    assert loss == pytest.approx(math.log(2), abs=tolerance)


def test_the_model_s_own_dropout_is_on_where_it_is_asked_for(base: str) -> None:
    losses = {first_loss(base, policy_training(lora=None, model_dropout=on)) for on in (False, True)}
    assert len(losses) == 2


@pytest.mark.parametrize(
    ("training", "is_on"),
    [
        (PolicyTraining(lora=None), False),
        (ConstrainedTraining(lora=None), False),
        (ConstrainedTraining(lora=None, model_dropout=True), True),
        (SupervisedTraining.model_validate({"source": {"path": "x"}}), True),
    ],
)
def test_dropout_is_off_where_a_policy_is_compared_with_a_reference(base: str, training: Training, is_on: bool) -> None:
    """Two passes over the same ids differ in training mode exactly where dropout is on."""
    model = load_trainable(base, training, seed=0).train()
    ids = torch.tensor([[1, 8, 9, 10, 11, 12, 13]])
    first, second = (model(input_ids=ids).logits for _ in range(2))
    assert torch.equal(first, second) != is_on


def test_lora_s_dropout_stays(base: str) -> None:
    training = policy_training(lora={"rank": 4, "dropout": 0.5})
    model = load_trainable(base, training, seed=0).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.tensor([[1, 8, 9, 10]])
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_what_is_written_has_the_dropout_of_the_model_that_it_was_made_from(base: str, tmp_path: Path) -> None:
    config = config_without_dropout(base)
    assert config.to_dict() != AutoConfig.from_pretrained(base).to_dict()
    restore_dropout(config, base)
    assert config.to_dict() == AutoConfig.from_pretrained(base).to_dict()
