"""The mixture as a vLLM model: one distribution out of the policies' hidden states.

λ goes with the hidden states, in columns of its own, so that it meets the logits in whatever order vLLM asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig

from mpo_ray.maths.log_linear import log_normalizer
from mpo_ray.vllm_plugin.log_z import with_log_z
from mpo_ray.vllm_plugin.policy_models import PolicyModels
from mpo_ray.vllm_plugin.request_weights import RequestWeights


class VllmMixture(PolicyModels):
    """log q(v | y_<t) = Σ_k λ_k log π_k(v | y_<t) − log Z_t, with each request's own λ."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._tells_log_z = vllm_config.model_config.logprobs_mode == "raw_logits"
        self._weights = RequestWeights.newest()
        #: Whether the shared head is linear: Gemma 2's is not.
        self._one_row = getattr(getattr(self.base, "logits_processor", None), "soft_cap", 0.0) is None
        columns = torch.tensor([self.objectives.index(name) for name in self.order])
        self._columns = nn.Buffer(columns, persistent=False)  # of λ, in this order

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The policies' hidden states and λ, side by side: (T, Σ d_k and the columns of λ)."""
        states = self.hidden_states(input_ids, positions)
        weights = self._weights.of_tokens(len(input_ids))
        return torch.cat([*states, _packed(weights, states[0].dtype)], dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The mixture's log-probabilities, (N, V) float32; with raw logits asked for, log Z_t in two more columns."""
        *states, packed = hidden_states.split_with_sizes(
            [*self.sizes, hidden_states.shape[-1] - sum(self.sizes)], dim=-1
        )
        weights = _unpacked(packed).index_select(1, self._columns)
        num = len(self.adapted)
        parts = [self._of_adapters(states[:num], weights[:, :num])] if num else []
        for number, (name, state) in enumerate(zip(self.order[num:], states[num:], strict=True), start=num):
            logits = self.model_of(name).compute_logits(state)
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


def _packed(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 (T, K) as columns of another type, bit for bit."""
    return weights.contiguous().view(dtype)


def _unpacked(columns: Tensor) -> Tensor:
    return columns.contiguous().view(torch.float32)
