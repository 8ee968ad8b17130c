"""The configuration of a mixture: what `config.json` of a mixture artefact says (design 5.3)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import AutoConfig, PreTrainedConfig

from mpo_ray.records import check_weights


class MixtureConfig(PreTrainedConfig):  # type: ignore[misc]
    """`model_type: "mpo_mixture"`.

    objectives: names in order; `policies/<objective>/` holds each one's adapter or full weights
    weights: λ by objective, on the simplex
    reference: `reference` where the artefact holds a copy, else a directory or hub id; LoRA policies adapt it
    reference_digest: of its content where it is a directory, else None
    policy_digests: content of each policy's directory
    policy_files: per objective, the SHA-256 of each of its files, so that a damaged one can be named
    vocabulary_digest: what all policies share; see `loading.vocabulary_digest`
    text: whether prompts that are texts are `rendered` already, or `plain` words (`data.text` of the run)
    text_config: the reference's own, for programs that want to know a model's layers and heads before they load it
    """

    model_type = "mpo_mixture"
    sub_configs: ClassVar = {"text_config": AutoConfig}

    def __init__(
        self,
        objectives: list[str] | None = None,
        weights: Mapping[str, float] | None = None,
        reference: str = "reference",
        reference_digest: str | None = None,
        policy_digests: Mapping[str, str] | None = None,
        policy_files: Mapping[str, Mapping[str, str]] | None = None,
        vocabulary_digest: str | None = None,
        vocab_size: int | None = None,
        max_position_embeddings: int | None = None,
        text: Literal["rendered", "plain"] = "rendered",
        text_config: Mapping[str, Any] | PreTrainedConfig | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.objectives = list(objectives or [])
        self.weights = check_weights(weights, self.objectives, where="the mixture's weights") if weights else {}
        self.reference = reference
        self.reference_digest = reference_digest
        self.policy_digests = dict(policy_digests or {})
        self.policy_files = {name: dict(files) for name, files in (policy_files or {}).items()}
        self.vocabulary_digest = vocabulary_digest
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.text = text
        if isinstance(text_config, Mapping):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.use_cache = use_cache
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """As of every config; whoever reads one may next ask transformers for its model, so that is registered now."""
        importlib.import_module("mpo_ray.policies.mixture")
        if "name_or_path" in kwargs:
            config_dict = _with_text_config(config_dict, Path(kwargs["name_or_path"]))
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As of every config, which is told where it was read, as AutoConfig does."""
        told = {"name_or_path": str(pretrained_model_name_or_path), **kwargs}
        return super().from_pretrained(pretrained_model_name_or_path, **told)


def _with_text_config(found: Mapping[str, Any], artefact: Path) -> Mapping[str, Any]:
    """What an artefact says; one that was written before `text_config` was known has its reference's."""
    reference = artefact / found.get("reference", "")
    if found.get("text_config") or not found.get("objectives") or not (reference / "config.json").is_file():
        return found
    own = AutoConfig.from_pretrained(reference, trust_remote_code=False).get_text_config()
    return {**found, "text_config": own.to_dict()}


AutoConfig.register(MixtureConfig.model_type, MixtureConfig, exist_ok=True)
