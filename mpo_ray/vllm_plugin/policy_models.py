"""The K policies of a mixture artefact as one vLLM module: all of them side by side in every pass.

A policy with full weights is a vLLM model of its own. Those that are LoRA adapters share one model of the reference:
their hidden states go through its layers end to end, and each adapter adds its part to its own. Every policy's
attention layers have a key-value cache of their own, which vLLM keeps in pages as it does any layer's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator
from vllm.model_executor.models.interfaces import has_inner_state, is_attention_free
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix

from mpo_ray.policies.artefact import policy_path, reference_path
from mpo_ray.policies.loading import ModelError, is_adapter
from mpo_ray.vllm_plugin.adapted import StackedAttention, add_adapters


class PolicyModels(nn.Module):
    """Builds the policies and loads them; what is made of their hidden states is for the classes derived from it.

    order: the objectives as the hidden states hold them, adapters first; sizes: columns of each
    """

    #: The artefact has no weights at its top; vLLM looks for some before it calls `load_weights`, which finds its own.
    allow_patterns_overrides: ClassVar = ["policies/*/*.safetensors"]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        config = model_config.hf_config
        self._directory = Path(model_config.model)
        self._reference = reference_path(self._directory, config)
        self.objectives: list[str] = list(config.objectives)
        adapted = [name for name in self.objectives if is_adapter(policy_path(self._directory, name))]
        full = [name for name in self.objectives if name not in adapted]

        def build(name: str, source: str | Path) -> nn.Module:
            inner = AutoConfig.from_pretrained(source, trust_remote_code=False)
            # a layer's name may hold one number, which is the layer's: an objective is called policy_2, not 2
            path = maybe_prefix(prefix, f"policy_{name}")
            model: nn.Module = init_vllm_registered_model(vllm_config=vllm_config, prefix=path, hf_config=inner)
            if has_inner_state(model) or is_attention_free(model):
                raise ModelError(
                    f"{source}: a {type(model).__name__} keeps a state that is no key-value cache, of which vLLM holds "
                    "one for each sequence and not one for each policy. Decode this mixture with its own generate()."
                )
            return model

        self.adapted = adapted
        self.base: Any = build(adapted[0], self._reference) if adapted else None
        if self.base is not None:
            with torch.device("meta"):  # for their attention layers alone
                others = [build(name, self._reference) for name in adapted[1:]]
            _stack_attention(self.base, others, compiled=not model_config.enforce_eager)
        self.full = nn.ModuleDict({f"policy_{name}": build(name, policy_path(self._directory, name)) for name in full})
        self.order = [*adapted, *full]
        self.sizes = [self.model_of(name).config.get_text_config().hidden_size for name in self.order]

    def model_of(self, name: str) -> Any:
        """The model that computes a policy: the base, or its own."""
        return self.base if name in self.adapted else self.full[f"policy_{name}"]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.model_of(self.objectives[0]).embed_input_ids(input_ids)
        return embedded

    def hidden_states(self, input_ids: Tensor, positions: Tensor) -> list[Tensor]:
        """Of each policy in `order`, (T, d_k)."""
        states: list[Tensor] = []
        if self.base is not None:
            num = len(self.adapted)
            states += self.base(input_ids.repeat(num), positions.repeat(num)).chunk(num)
        return states + [model(input_ids, positions) for model in self.full.values()]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load every policy by its own model's loader. weights: not read; vLLM makes them of files without an order."""
        if self.base is not None:
            _load(self.base, Path(self._reference))
            add_adapters(self.base, [policy_path(self._directory, name) for name in self.adapted])
        for name in self.objectives:
            if name not in self.adapted:
                _load(self.model_of(name), policy_path(self._directory, name))
        return {name for name, _ in self.named_parameters()}


def _stack_attention(base: nn.Module, others: Sequence[nn.Module], *, compiled: bool) -> None:
    """Let every attention layer of the base be that of all policies: each with its own cache."""
    layers = {name: module for name, module in base.named_modules() if isinstance(module, Attention)}
    for name, layer in layers.items():
        device = next(base.parameters()).device
        each = [layer, *(other.get_submodule(name).to_empty(device=device) for other in others)]
        parent, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(parent), leaf, StackedAttention(each, compiled=compiled))


def _load(model: Any, directory: Path) -> None:
    """Load the weights at `directory` by the model's own loader. Raises ModelError where they are not whole."""
    files = sorted(str(path) for path in directory.glob("model*.safetensors"))
    loaded = model.load_weights(safetensors_weights_iterator(files, use_tqdm_on_load=False))
    if missing := {name for name, _ in model.named_parameters()} - loaded:
        raise ModelError(
            f"{directory}: there are no weights for {min(missing)!r} ({len(missing)} in all). Copy it whole."
        )
