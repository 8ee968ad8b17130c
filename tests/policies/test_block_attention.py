"""Sequences in preallocated rows: what a model says is what it says by itself, whatever its attention is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mpo_ray.decoding.branch import Piece
from mpo_ray.decoding.need import Need
from mpo_ray.decoding.runner import MixtureRunner
from mpo_ray.policies.cpu import optimize_for_cpu
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.policies.mixture_config import MixtureConfig
from mpo_ray.policies.ragged_attention import NotInBlocksError
from tests.tiny import TINY_SIZES

SIZES = {**TINY_SIZES, "vocab_size": 40}
GEMMA: dict[str, Any] = {**SIZES, "query_pre_attn_scalar": 8, "sliding_window": 4}
CAPPED: dict[str, Any] = {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
DEEPSEEK: dict[str, Any] = {
    **{key: value for key, value in SIZES.items() if key != "head_dim"},
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "rope_theta": 1e4,
    },
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "one key head": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 1})),
    "mistral, window of 4": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    "llama, positions that change beyond its context": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    ),
    "phi3, other positions beyond 16 tokens": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, **LONGROPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "cohere, scaled logits": lambda: CohereForCausalLM(CohereConfig(**SIZES)),
    "granite, divided logits": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=1.5)),
    "deepseek, values of another size": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),
    "gemma2, capped, window of 4": lambda: Gemma2ForCausalLM(Gemma2Config(**CAPPED)),
    "gemma3, window of 4": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)),
}
IDS = torch.randint(3, 40, (3, 14), generator=torch.Generator().manual_seed(0)).tolist()


def alone(model: PreTrainedModel) -> MixtureForCausalLM:
    """A mixture of this policy and no other."""
    config = MixtureConfig(["only"], {"only": 1.0}, vocab_size=40, max_position_embeddings=64)
    return MixtureForCausalLM(config, adapters=None, full={"only": model}).eval()


def random_model(name: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]().eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("optimized", [True, False])
def test_a_sequence_in_blocks_has_the_models_own_distributions(name: str, separate: bool, optimized: bool) -> None:
    """Three sequences in pieces of 5, 1 and 3 tokens, out of step with each other: log π after every token, to 1e-5."""
    model = random_model(name)
    with torch.no_grad():
        expected = model(torch.tensor(IDS)).logits.float().log_softmax(-1)
    assert not optimized or optimize_for_cpu(model)
    runner = MixtureRunner(alone(model), max_num_seqs=6)
    need = Need((0,), (), min(64, runner.context))
    lanes = [runner.open(need)[0][0] for _ in range(5)]
    lanes = [lanes[1], lanes[2], lanes[4]]  # their rows do not begin at 0, and one in between is not theirs
    done, found = [0, 0, 0], [[], [], []]  # type: ignore[var-annotated]
    for step in range(40):
        pieces, numbers = [], []
        for number, lane in enumerate(lanes):
            size = (5, 1, 3)[(step + number) % 3]
            tokens = IDS[number][done[number] : done[number] + size]
            if tokens and (step + number) % 4:
                pieces.append(Piece(lane, tokens, done[number], (1.0,), len(tokens), separate))
                numbers += [number] * len(tokens)
                done[number] += len(tokens)
        if pieces:
            for number, row in zip(numbers, runner.run(pieces).logits, strict=True):
                found[number].append(row)
    for number, rows in enumerate(found):
        logprobs = torch.stack(rows).log_softmax(-1)
        torch.testing.assert_close(logprobs, expected[number], atol=1e-5, rtol=1e-5)


def test_the_models_own_forward_stays_what_it_was() -> None:
    """By itself, after it was decoded in blocks, with layers that were changed for that, it gives the same logits."""
    model = random_model("gemma2, capped, window of 4")
    expected = model(torch.tensor(IDS)).logits
    assert optimize_for_cpu(model)
    runner = MixtureRunner(alone(model), max_num_seqs=2)
    runner.run([Piece(runner.open(Need((0,), (), 64))[0][0], IDS[0], 0, (1.0,), 1, True)])
    torch.testing.assert_close(model(torch.tensor(IDS)).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (
            lambda: PhimoeForCausalLM(
                PhimoeConfig(**SIZES, num_local_experts=2, num_experts_per_tok=2, sliding_window=16)
            ),
            "PhimoeForCausalLM: .* differ by",
        ),
        (
            lambda: GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)),
            "GptOssForCausalLM: .* differ by",
        ),
    ],
    ids=["a window in the mask alone", "attention sinks"],
)
def test_an_architecture_that_would_be_decoded_wrongly_is_refused(
    make: Callable[[], PreTrainedModel], complaint: str
) -> None:
    """Whatever the length of the probe: windows that are longer are shortened for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
    with pytest.raises(NotInBlocksError, match=complaint):
        MixtureRunner(alone(model), max_num_seqs=2)
