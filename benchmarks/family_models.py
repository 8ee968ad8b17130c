"""Tiny random models of many families, made from their configuration classes, for `benchmarks.families`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from mpo_ray.policies.scratch import write_scratch_model

#: Beside the six special tokens.
WORDS = [f"w{number}" for number in range(34)]
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW: dict[str, Any] = {"sliding_window": 8}
GEMMA: dict[str, Any] = {**WINDOW, "query_pre_attn_scalar": 8}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT: dict[str, Any] = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}


def _made(config: str, *without: str, **changes: Any) -> Any:
    values = {key: value for key, value in {**SIZES, **changes}.items() if key not in without}
    return lambda: getattr(transformers, config)(**values)


#: How to make the configuration of a family's model, by the family's name in `policies.families`.
CONFIGS = {
    "Llama": _made("LlamaConfig"),
    "Mistral": _made("MistralConfig", **WINDOW),
    "Mixtral": _made("MixtralConfig", **EXPERTS),
    "Qwen2": _made("Qwen2Config"),
    "Qwen2-MoE": _made("Qwen2MoeConfig", **MOE, shared_expert_intermediate_size=32),
    "Qwen3": _made("Qwen3Config"),
    "Qwen3-MoE": _made("Qwen3MoeConfig", **MOE),
    "Qwen3-Next": _made(  # its chunks and its steps round apart, the more the larger its weights
        "Qwen3NextConfig",
        initializer_range=0.15,
        **MOE,
        shared_expert_intermediate_size=32,
        num_hidden_layers=4,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
    "Gemma 2": _made("Gemma2Config", **GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "Gemma 3": _made(
        "Gemma3TextConfig",
        **GEMMA,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "Gemma 3n": _made(
        "Gemma3nTextConfig",
        **WINDOW,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=40,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        laurel_rank=4,
        altup_num_inputs=2,
        intermediate_size=[64] * 4,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    ),
    "Phi-3": _made("Phi3Config", **WINDOW),
    "Phi-MoE": _made("PhimoeConfig", **EXPERTS, sliding_window=16),
    "OLMo 2": _made("Olmo2Config"),
    "OLMo 3": _made("Olmo3Config", **WINDOW, num_hidden_layers=4),
    "Granite": _made(
        "GraniteConfig", embedding_multiplier=2.0, logits_scaling=1.5, residual_multiplier=0.5, attention_multiplier=0.2
    ),
    "SmolLM3": _made("SmolLM3Config", num_hidden_layers=4),
    "GPT-2": _made("GPT2Config", n_positions=128, n_embd=32, n_layer=2, n_head=4),
    "GPT-NeoX": _made("GPTNeoXConfig"),
    "OPT": _made("OPTConfig", ffn_dim=64, word_embed_proj_dim=32, dropout=0.1, init_std=0.3),
    "Falcon": _made("FalconConfig", "head_dim", alibi=False),
    "Falcon alibi": _made("FalconConfig", "head_dim", alibi=True, multi_query=False),
    "StableLM": _made("StableLmConfig"),
    "Bloom": _made("BloomConfig", n_layer=2, n_head=4),
    "DeepSeek-V3": _made(
        "DeepseekV3Config",
        "head_dim",
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "GPT-OSS": _made("GptOssConfig", **EXPERTS, **WINDOW),
    "Cohere 2": _made("Cohere2Config", **WINDOW, num_hidden_layers=4),
    "Cohere": _made("CohereConfig"),
    "EXAONE 4": _made("Exaone4Config", **WINDOW, num_hidden_layers=4),
    "GLM 4": _made("Glm4Config"),
    "GLM-4-MoE": _made(
        "Glm4MoeConfig",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        n_shared_experts=1,
    ),
    "LFM2": _made("Lfm2Config", num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2, conv_L_cache=3),
    "Mamba2": _made("Mamba2Config", num_heads=8, head_dim=8, state_size=8, n_groups=2, chunk_size=8, conv_kernel=4),
    "Mamba": _made("MambaConfig", state_size=8),
    "RecurrentGemma": _made("RecurrentGemmaConfig", lru_width=32, attention_window_size=8, num_hidden_layers=3),
    "Llama dynamic": _made(
        "LlamaConfig",
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        max_position_embeddings=64,
    ),
    "Phi-3 longrope": _made(
        "Phi3Config",
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "rope_theta": 1e4,
        },
    ),
    "Jamba": _made(
        "JambaConfig",
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_offset=1,
        attn_layer_period=2,
        use_mamba_kernels=False,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "Bamba": _made("BambaConfig", mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, attn_layer_indices=[1]),
    "Falcon-H1": _made(
        "FalconH1Config", mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1
    ),
    "Phi": _made("PhiConfig"),
    "GPT-J": _made("GPTJConfig", n_positions=128, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "GPT-Neo": _made(
        "GPTNeoConfig", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8
    ),
    "MPT": _made("MptConfig", d_model=32, n_heads=4, n_layers=2, max_seq_len=128),
    "CodeGen": _made("CodeGenConfig", n_positions=128, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "Starcoder2": _made("Starcoder2Config", **WINDOW),
    "OLMoE": _made("OlmoeConfig", num_experts=4, num_experts_per_tok=2),
    "DeepSeek-V2": _made(
        "DeepseekV2Config",
        "head_dim",
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
}


def make_model(family: str) -> Any:
    """A random model, the same at every call. Biases and norms, which begin as 0 and 1, are moved from there."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if "bias" in name and buffer.is_floating_point():
                buffer += 0.2 * torch.randn_like(buffer)
    return model


def write_reference(family: str, directory: Path) -> Path:
    """Save a family's model, with a tokenizer of one word per token."""
    write_scratch_model(directory, WORDS, hidden_size=8, num_layers=1, context=128, seed=0)
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        (directory / file).unlink()
    make_model(family).save_pretrained(directory)
    return directory
