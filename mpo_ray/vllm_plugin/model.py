"""The mixture as a vLLM model: K policies side by side in every pass, one distribution out of it.

A policy with full weights is a vLLM model of its own. Those that are LoRA adapters share one model of the reference:
their hidden states go through its layers end to end, and each adapter adds its part to its own. Every policy's
attention layers have a key-value cache of their own, which vLLM keeps in pages as it does any layer's.

λ goes with the hidden states, in columns of its own, so that it meets the logits in whatever order vLLM asks for them.
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

from mpo_ray.maths.log_linear import log_normalizer
from mpo_ray.policies.artefact import policy_path, reference_path
from mpo_ray.policies.loading import ModelError, is_adapter
from mpo_ray.vllm_plugin.adapted import StackedAttention, add_adapters
from mpo_ray.vllm_plugin.log_z import with_log_z
from mpo_ray.vllm_plugin.request_weights import RequestWeights


class VllmMixture(nn.Module):
    """log q(v | y_<t) = Σ_k λ_k log π_k(v | y_<t) − log Z_t, with each request's own λ."""

    #: The artefact has no weights at its top; vLLM looks for some before it calls `load_weights`, which finds its own.
    allow_patterns_overrides: ClassVar = ["policies/*/*.safetensors"]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        config = model_config.hf_config
        self._directory = Path(model_config.model)
        self._reference = reference_path(self._directory, config)
        self._tells_log_z = model_config.logprobs_mode == "raw_logits"
        self._weights = RequestWeights.newest()
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
            _stack_attention(self.base, others)
        self.full = nn.ModuleDict({f"policy_{name}": build(name, policy_path(self._directory, name)) for name in full})
        #: Whether the shared head is linear: Gemma 2's is not.
        self._one_row = getattr(getattr(self.base, "logits_processor", None), "soft_cap", 0.0) is None
        self._order = [*adapted, *full]
        columns = torch.tensor([self.objectives.index(name) for name in self._order])
        self._columns = nn.Buffer(columns, persistent=False)  # of λ, in this order
        self._sizes = [self._model_of(name).config.get_text_config().hidden_size for name in self._order]

    def _model_of(self, name: str) -> Any:
        return self.base if name in self.adapted else self.full[f"policy_{name}"]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self._model_of(self.objectives[0]).embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The policies' hidden states and λ, side by side: (T, Σ d_k and the columns of λ)."""
        states: list[Tensor] = []
        if self.base is not None:
            num = len(self.adapted)
            states += self.base(input_ids.repeat(num), positions.repeat(num)).chunk(num)
        states += [model(input_ids, positions) for model in self.full.values()]
        weights = self._weights.of_tokens(len(input_ids))
        return torch.cat([*states, _packed(weights, states[0].dtype)], dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The mixture's log-probabilities, (N, V) float32; with raw logits asked for, log Z_t in two more columns."""
        *states, packed = hidden_states.split_with_sizes(
            [*self._sizes, hidden_states.shape[-1] - sum(self._sizes)], dim=-1
        )
        weights = _unpacked(packed).index_select(1, self._columns)
        num = len(self.adapted)
        parts = [self._of_adapters(states[:num], weights[:, :num])] if num else []
        for number, (name, state) in enumerate(zip(self._order[num:], states[num:], strict=True), start=num):
            logits = self._model_of(name).compute_logits(state)
            parts.append(None if logits is None else weights[:, number, None] * logits.float().log_softmax(-1))
        found = [part for part in parts if part is not None]
        if not found:  # another rank has them
            return None
        mixed = torch.stack(found).sum(0) if len(found) > 1 else found[0]
        if not self._tells_log_z:
            return mixed.log_softmax(-1)  # penalties that multiply want what is below 0 everywhere
        log_z = log_normalizer(mixed)
        return with_log_z(mixed - log_z[:, None], log_z)

    def _of_adapters(self, states: Sequence[Tensor], weights: Tensor) -> Tensor | None:
        """Σ_k λ_k log π_k of the policies on one base, (N, V), which has one output head.

        Σ_k λ_k W h_k = W Σ_k λ_k h_k: up to a constant of each row, which log Z_t is about, one row of a head that is
        linear is enough.
        """
        if self._one_row and not self._tells_log_z:
            mixed = torch.einsum("nk,knd->nd", weights, torch.stack([*states]).float())
            logits: Tensor | None = self.base.compute_logits(mixed.to(states[0].dtype))
            return None if logits is None else logits.float()
        logits = self.base.compute_logits(torch.cat([*states]))
        if logits is None:
            return None
        each = logits.float().log_softmax(-1).view(len(states), -1, logits.shape[-1])
        return torch.einsum("nk,knv->nv", weights, each)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load every policy by its own model's loader. weights: not read; vLLM makes them of files without an order."""
        if self.base is not None:
            _load(self.base, Path(self._reference))
            add_adapters(self.base, [policy_path(self._directory, name) for name in self.adapted])
        for name in self.objectives:
            if name not in self.adapted:
                _load(self._model_of(name), policy_path(self._directory, name))
        return {name for name, _ in self.named_parameters()}


def _stack_attention(base: nn.Module, others: Sequence[nn.Module]) -> None:
    """Let every attention layer of the base be that of all policies: each with its own cache."""
    layers = {name: module for name, module in base.named_modules() if isinstance(module, Attention)}
    for name, layer in layers.items():
        device = next(base.parameters()).device
        each = [layer, *(other.get_submodule(name).to_empty(device=device) for other in others)]
        parent, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(parent), leaf, StackedAttention(each))


def _load(model: Any, directory: Path) -> None:
    """Load the weights at `directory` by the model's own loader. Raises ModelError where they are not whole."""
    files = sorted(str(path) for path in directory.glob("model*.safetensors"))
    loaded = model.load_weights(safetensors_weights_iterator(files, use_tqdm_on_load=False))
    if missing := {name for name, _ in model.named_parameters()} - loaded:
        raise ModelError(
            f"{directory}: there are no weights for {min(missing)!r} ({len(missing)} in all). Copy it whole."
        )


def _packed(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 (T, K) as columns of another type, bit for bit."""
    return weights.contiguous().view(dtype)


def _unpacked(columns: Tensor) -> Tensor:
    return columns.contiguous().view(torch.float32)
