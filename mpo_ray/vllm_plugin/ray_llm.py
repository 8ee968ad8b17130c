"""The mixture through Ray's own LLM stack: `ray.serve.llm` with vLLM, which knows the artefact by this package's entry
points.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from ray import serve as ray_serve

from mpo_ray.config import ConfigError
from mpo_ray.config_training import Strict
from mpo_ray.policies.artefact import check_artefact
from mpo_ray.policies.mixture_config import MixtureConfig


class RayLlm(Strict):
    """`args` of `serve_apps.mixture_vllm:build`. llm: further fields of `ray.serve.llm.LLMConfig`."""

    artefact: str
    name: str
    llm: dict[str, Any] = Field({})


def build(args: Mapping[str, Any]) -> ray_serve.Application:
    """Application builder for `serve run` and `serve deploy`. Raises ConfigError, ModelError."""
    try:
        from ray.serve.llm import LLMConfig, build_openai_app
    except ImportError as error:
        raise ConfigError(
            f"ray.serve.llm needs vLLM ({error}). Install it beside this package on every node, "
            "pip install 'mpo_ray[vllm]', or serve serve_apps/mixture.yaml with engine: mpo."
        ) from None
    try:
        arguments = RayLlm.model_validate(dict(args))
        if "model_loading_config" in arguments.llm:
            raise ConfigError("llm.model_loading_config: it follows from artefact and name; leave it out.")
        artefact = Path(arguments.artefact).absolute()  # replicas have their own working directory
        check_artefact(artefact, MixtureConfig.from_pretrained(artefact))
        loading = {"model_id": arguments.name, "model_source": str(artefact)}
        config = LLMConfig(model_loading_config=loading, **arguments.llm)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ConfigError(f"serve application arguments: {problems}") from None
    app: ray_serve.Application = build_openai_app({"llm_configs": [config]})
    return app
