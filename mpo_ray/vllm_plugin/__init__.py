"""The mixture artefact as a vLLM model; vLLM finds it by the entry points of this package (pyproject.toml)."""

from __future__ import annotations


def register() -> None:
    """Tell vLLM of the architectures. Called by vLLM in each of its processes, for the group `vllm.general_plugins`."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from mpo_ray.vllm_plugin.start_check import StartCheck

    ModelRegistry.register_model("MixtureForCausalLM", "mpo_ray.vllm_plugin.model:VllmMixture")
    ModelRegistry.register_model("MixtureScorer", "mpo_ray.vllm_plugin.scoring_model:VllmScorer")
    MODELS_CONFIG_MAP["MixtureForCausalLM"] = MODELS_CONFIG_MAP["MixtureScorer"] = StartCheck
