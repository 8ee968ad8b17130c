"""Models of a run in vLLM's `LLM`, which an actor opens beside the models that it scores with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mpo_ray.decoding.sampler import Room
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.loading import ModelError, is_adapter
from mpo_ray.policies.memory import GIB
from mpo_ray.policies.mixture_config import MixtureConfig
from mpo_ray.vllm_plugin.arguments import engine_arguments, set_environment, whole_pages

#: Tokens that vLLM keeps the caches of on a CPU, or those of one sequence where it may be longer.
_TOKENS_ON_CPU = 2**15
#: Of what is free on a GPU when vLLM is opened, weights and KV cache: the actor's other models need the rest.
SHARE_BESIDE = 0.5


def open_llm(
    reference: str,
    policies: Mapping[str, str],
    *,
    precision: str,
    room: Room,
    own: Mapping[str, Any],
    further: Mapping[str, Any],
) -> tuple[Any, MixtureConfig]:
    """A mixture of the policies as an `LLM`, and its configuration.

    room: without `kv_cache_gib` the KV cache has 2^15 tokens on a CPU, and on a GPU what is left of `SHARE_BESIDE`
    own: arguments of the caller's; further: the operator's, of vLLM's `EngineArgs`, which come before all others
    Raises ModelError for policies that vLLM cannot hold, ConfigError for arguments that it does not have.
    """
    if not Path(reference).is_dir() and any(is_adapter(path) for path in policies.values()):
        raise ModelError(
            f"scoring.engine: vllm needs the reference of LoRA policies as a directory, not as {reference!r}. Name "
            "a directory in reference.model, or set engine: mpo."
        )
    set_environment()
    from vllm import LLM, EngineArgs

    with TemporaryDirectory(prefix="mpo-ray-vllm-") as directory:
        config = write_artefact(
            Path(directory),
            objectives=dict(policies),
            reference=reference,
            copy_policies=False,
            copy_reference=False,
            weights=dict.fromkeys(policies, 1 / len(policies)),
            fit={},
            precision=precision,
        )
        context = further.get("max_model_len", config.max_position_embeddings)
        ours = {
            "max_num_seqs": room.max_num_seqs,
            **({} if context is None else {"max_model_len": context}),
            **memory_arguments(room.kv_cache_gib),
            **own,
        }
        kept_tokens = max(_TOKENS_ON_CPU, whole_pages(context or 0))
        settings = engine_arguments(
            directory, config, EngineArgs, ours, further, where="scoring.vllm", kept_tokens=kept_tokens
        )
        return LLM(**settings), config


def memory_arguments(kv_cache_gib: float | None) -> dict[str, Any]:
    """Arguments for the memory that is asked for. vLLM compares its share of a GPU with what is free there."""
    found: dict[str, Any] = {} if kv_cache_gib is None else {"kv_cache_memory_bytes": int(kv_cache_gib * GIB)}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what PyTorch keeps of tensors that are gone is free as well
        free, total = torch.cuda.mem_get_info()
        found["gpu_memory_utilization"] = SHARE_BESIDE * free / total
    return found
