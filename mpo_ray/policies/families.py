"""The families of models that are under test, and how each is run: one list, for the code and for readers.

A family that is not here can be used too: batches are padded, and trials at opening say how it is decoded. Imports
nothing that takes time, so that a command can show the list at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """Models of one configuration class, or of a variant of it.

    model_type: as their `config.json` has it
    in_blocks: whether the engine decodes them with their cache in KV-cache blocks; else in transformers' own cache
    packs: whether training and scoring leave out padding, and compute a shared prompt once; never with sliding windows
    on_vllm: whether the vLLM plugin is tested with them too
    """

    name: str
    model_type: str
    in_blocks: bool = True
    packs: bool = False
    on_vllm: bool = False


#: In the order of docs/models.md. `benchmarks.families` trains, mixes and decodes a tiny model of each.
FAMILIES = (
    Family("Llama", "llama", packs=True, on_vllm=True),
    Family("Mistral", "mistral", packs=True),
    Family("Mixtral", "mixtral"),
    Family("Qwen2", "qwen2", packs=True, on_vllm=True),
    Family("Qwen2-MoE", "qwen2_moe"),
    Family("Qwen3", "qwen3", packs=True, on_vllm=True),
    Family("Qwen3-MoE", "qwen3_moe"),
    Family("Qwen3-Next", "qwen3_next", in_blocks=False),
    Family("Gemma 2", "gemma2", on_vllm=True),
    Family("Gemma 3", "gemma3_text", on_vllm=True),
    Family("Gemma 3n", "gemma3n_text", in_blocks=False),
    Family("Phi-3", "phi3"),
    Family("Phi-MoE", "phimoe", in_blocks=False),
    Family("OLMo 2", "olmo2"),
    Family("OLMo 3", "olmo3"),
    Family("Granite", "granite"),
    Family("SmolLM3", "smollm3"),
    Family("GPT-2", "gpt2"),
    Family("GPT-NeoX", "gpt_neox"),
    Family("OPT", "opt"),
    Family("Falcon", "falcon", in_blocks=False),
    Family("Falcon alibi", "falcon", in_blocks=False),
    Family("StableLM", "stablelm"),
    Family("Bloom", "bloom", in_blocks=False),
    Family("DeepSeek-V3", "deepseek_v3"),
    Family("GPT-OSS", "gpt_oss", in_blocks=False),
    Family("Cohere 2", "cohere2"),
    Family("Cohere", "cohere"),
    Family("EXAONE 4", "exaone4"),
    Family("GLM 4", "glm4"),
    Family("GLM-4-MoE", "glm4_moe"),
    Family("LFM2", "lfm2", in_blocks=False),
    Family("Mamba2", "mamba2", in_blocks=False),
    Family("Mamba", "mamba", in_blocks=False),
    Family("RecurrentGemma", "recurrent_gemma", in_blocks=False),
    Family("Llama dynamic", "llama", packs=True),
    Family("Phi-3 longrope", "phi3"),
    Family("Jamba", "jamba", in_blocks=False),
    Family("Bamba", "bamba", in_blocks=False),
    Family("Falcon-H1", "falcon_h1", in_blocks=False),
    Family("Phi", "phi"),
    Family("GPT-J", "gptj", in_blocks=False),
    Family("GPT-Neo", "gpt_neo", in_blocks=False),
    Family("MPT", "mpt", in_blocks=False),
    Family("CodeGen", "codegen", in_blocks=False),
    Family("Starcoder2", "starcoder2"),
    Family("OLMoE", "olmoe"),
    Family("DeepSeek-V2", "deepseek_v2"),
)

_HEADS = ("family", "model_type", "decoded", "padding left out", "vLLM")
_NOTES = (
    "Any causal language model of transformers with safetensors can be used: no list decides. Of each family here a",
    "tiny random model was trained with DPO (LoRA and all weights; in bf16 one step of LoRA), mixed, decoded in fp32,",
    "and compared with plain transformers and PEFT; docs/models.md has the differences. A real model may differ in its",
    "settings: `mpo-ray check` opens yours.",
    "",
    "decoded           in blocks: in the engine's KV-cache blocks",
    "                  own cache: in transformers' cache, one sequence after the other, which is slower",
    "padding left out  in training and scoring, where the model has no sliding windows; else batches are padded",
    "vLLM              whether the vLLM plugin is tested with it; of others vLLM says whether it has the model",
)


def packs(model_type: str) -> bool:
    """Whether padding may be left out for models of this type: tokens meet only in plain, causal attention."""
    return any(family.packs for family in FAMILIES if family.model_type == model_type)


def as_text(families: Sequence[Family] = FAMILIES) -> str:
    """The list as a table, with what it says below."""
    rows = [_HEADS, *map(_row, families)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_NOTES])


def _row(family: Family) -> tuple[str, ...]:
    def told(holds: bool) -> str:
        return "yes" if holds else "no"

    decoded = "in blocks" if family.in_blocks else "own cache"
    return family.name, family.model_type, decoded, told(family.packs), "tested" if family.on_vllm else "not tested"
