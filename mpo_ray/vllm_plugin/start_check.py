"""What is looked at before vLLM starts a worker: the artefact, and settings under which a mixture would be wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from mpo_ray.policies.artefact import check_artefact, has_reference, policy_path, reference_path
from mpo_ray.policies.loading import ModelError, is_adapter
from mpo_ray.vllm_plugin import request_weights


class StartCheck(VerifyAndUpdateConfig):  # type: ignore[misc]
    """Refuses, by ModelError, what cannot be served; notes the objectives, for the check of requests."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        config, directory = vllm_config.model_config.hf_config, Path(vllm_config.model_config.model)
        check_artefact(directory, config)
        if has_reference(directory, config) and not Path(reference_path(directory, config)).is_dir():
            raise ModelError(
                f"{directory}: vLLM needs the reference of LoRA policies as a directory, not as the hub id "
                f"{config.reference!r}. Write the artefact again with its reference copied."
            )
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ModelError(f"{directory}: a mixture cannot be divided by layers; leave pipeline_parallel_size at 1.")
        if vllm_config.speculative_config is not None:
            raise ModelError(f"{directory}: a mixture cannot be decoded speculatively; leave speculative_config out.")
        if config.text_config is None:
            raise ModelError(
                f"{directory}: config.json has no text_config, which vLLM reads before it loads a model, and no "
                "reference beside it to take it from. Write the artefact again with its reference copied."
            )
        sources = _sources(directory, config)
        _check_families(directory, sources)
        _check_memory(directory, sources, vllm_config)
        request_weights.expect(config.objectives)


def _sources(directory: Path, config: Any) -> list[Path]:
    """The directories of the models that vLLM has to hold whole."""
    full = [path for name in config.objectives if not is_adapter(path := policy_path(directory, name))]
    return [*([Path(reference_path(directory, config))] if has_reference(directory, config) else []), *full]


def _check_families(directory: Path, sources: Sequence[Path]) -> None:
    known = ModelRegistry.get_supported_archs()
    for source in sources:
        names = AutoConfig.from_pretrained(source, trust_remote_code=False).architectures or []
        if not known & {*names}:
            raise ModelError(
                f"{directory}: {source.name} is a {', '.join(names) or 'model of no named class'}, which vLLM has no "
                "model for. Decode this mixture with engine: mpo, or with its own generate()."
            )


def _check_memory(directory: Path, sources: Sequence[Path], vllm_config: VllmConfig) -> None:
    """Refuse what cannot fit whatever else is there: the weights, and the caches of one sequence."""
    model = vllm_config.model_config
    item = model.dtype.itemsize
    weights = sum(_num_weights(file) for source in sources for file in source.glob("model*.safetensors")) * item
    text, policies = model.hf_config.text_config, len(model.hf_config.objectives)
    heads = model.get_total_num_kv_heads() * model.get_head_size()
    caches = policies * text.num_hidden_layers * 2 * heads * item * model.max_model_len
    devices = vllm_config.parallel_config.tensor_parallel_size
    room = devices * current_platform.get_device_total_memory()
    if weights + caches > room:
        raise ModelError(
            f"{directory}: its {policies} policies are {len(sources)} models with {weights / 2**30:.2f} GiB of weights "
            f"and need {caches / 2**30:.2f} GiB for one sequence of {model.max_model_len} tokens; {devices} device(s) "
            f"have {room / 2**30:.2f} GiB. Train adapters on one base, lower max_model_len (serve.context), or raise "
            "tensor_parallel_size."
        )


def _num_weights(file: Path) -> int:
    with safe_open(file, "pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
