"""What a mixture artefact wants of vLLM's engine: its environment and its arguments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mpo_ray.config import ConfigError
from mpo_ray.policies.mixture_config import MixtureConfig

#: Tokens of one of vLLM's pages on a CPU.
_PAGE = 128


def set_environment() -> None:
    """What vLLM reads from the environment, unless it is set already. Before vLLM is imported."""
    for name, value in {
        "VLLM_NO_USAGE_STATS": "1",  # tells nobody
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # on a CPU as many threads as the actor was given, on any core
        "VLLM_LOGGING_LEVEL": "WARNING",
    }.items():
        os.environ.setdefault(name, value)


def engine_arguments(
    artefact: str,
    config: MixtureConfig,
    known: type,
    own: Mapping[str, Any],
    further: Mapping[str, Any],
    *,
    where: str,
    kept_tokens: int,
) -> dict[str, Any]:
    """Arguments of one of vLLM's classes of engine arguments, `known`.

    own: those of the caller; further: the operator's, which come before all others, from the run file's section `where`
    kept_tokens: how many to make room for on a CPU; elsewhere vLLM takes what memory there is
    Raises ConfigError for one of the operator's that vLLM does not have.
    """
    from vllm.platforms import current_platform

    if unknown := sorted(further.keys() - {field.name for field in fields(known)}):
        raise ConfigError(f"{where}.{unknown[0]}: vLLM has no such engine argument; look at its {known.__name__}.")
    settings: dict[str, Any] = {
        "model": artefact,
        "dtype": str(config.dtype or "auto").removeprefix("torch."),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "disable_log_stats": True,
    }
    if current_platform.is_cpu():  # where nothing is gained by compiling, or by a process more
        settings["enforce_eager"] = True
        if further.get("tensor_parallel_size", 1) == 1:
            settings["distributed_executor_backend"] = "uni"
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # which vLLM wants for that
        settings["kv_cache_memory_bytes"] = kept_tokens * _bytes_per_token(config)
    return settings | dict(own) | dict(further)


def whole_pages(num_tokens: int) -> int:
    """Tokens of the pages that so many need."""
    return -(-num_tokens // _PAGE) * _PAGE


def _bytes_per_token(config: MixtureConfig) -> int:
    """Of the key-value caches of all policies, float32."""
    text: Any = config.text_config
    size = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return len(config.objectives) * int(text.num_hidden_layers) * 2 * int(text.num_key_value_heads) * size * 4
