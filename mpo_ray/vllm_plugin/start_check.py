"""What is looked at before vLLM starts a worker: the artefact, and settings under which a mixture would be wrong."""

from __future__ import annotations

from pathlib import Path

from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from mpo_ray.policies.artefact import check_artefact, has_reference, reference_path
from mpo_ray.policies.loading import ModelError
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
        request_weights.expect(config.objectives)
