"""`serve run serve_apps/mixture_vllm.yaml`: a mixture artefact through `ray.serve.llm`, with vLLM."""

from mpo_ray.vllm_plugin.ray_llm import build

__all__ = ["build"]
