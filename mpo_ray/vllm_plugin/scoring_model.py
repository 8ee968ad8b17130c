"""The policies of a mixture artefact as a vLLM model that judges given completions and generates nothing."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import Pooler, PoolingParamsUpdate
from vllm.tasks import PoolingTask
from vllm.v1.pool.metadata import PoolingMetadata

from mpo_ray.vllm_plugin.policy_models import PolicyModels

#: vLLM's name for work that ends in figures of each token.
TASK: PoolingTask = "token_classify"
#: Logits that are held at a time: 256 MiB of float32 for each policy.
_MOST_LOGITS = 2**26


class VllmScorer(PolicyModels):
    """Sequence → (K,) log π_k(completion | prompt), nats, in the order of the objectives."""

    is_pooling_model = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.pooler = _Sums(self)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The policies' hidden states side by side, (T, Σ d_k)."""
        return torch.cat(self.hidden_states(input_ids, positions), dim=-1)

    def token_logprobs(self, hidden_states: Tensor, targets: Tensor) -> Tensor:
        """log π_k of the tokens that follow, (T, K) float32. hidden_states: (T, Σ d_k); targets: (T,) their ids"""
        columns: dict[str, Tensor] = {}
        for name, states in zip(self.order, hidden_states.split_with_sizes(self.sizes, dim=-1), strict=True):
            model = self.model_of(name)
            some = max(1, _MOST_LOGITS // model.config.get_text_config().vocab_size)
            pieces = zip(torch.split(states, some), torch.split(targets, some), strict=True)
            columns[name] = torch.cat([_logprobs(model.compute_logits(piece), ids) for piece, ids in pieces])
        return torch.stack([columns[name] for name in self.objectives], dim=-1)


class _Sums(Pooler):  # type: ignore[misc]
    """Sums over the tokens of a completion, whose first place its request names; also where a pass holds a part."""

    def __init__(self, scorer: VllmScorer) -> None:
        super().__init__()
        self._scorer = (scorer,)  # which has this as a part

    def get_supported_tasks(self) -> Set[PoolingTask]:
        return {TASK}

    def get_pooling_updates(self, task: PoolingTask) -> PoolingParamsUpdate:
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> list[Tensor | None]:
        cursor = pooling_metadata.get_pooling_cursor()
        counts, ends = cursor.num_scheduled_tokens_cpu.tolist(), cursor.seq_lens_cpu.tolist()
        sums: list[Tensor | None] = []
        for states, count, end, ids, params, kept, finished in zip(
            torch.split(hidden_states, counts),
            counts,
            ends,
            pooling_metadata.get_prompt_token_ids_cpu(),
            pooling_metadata.pooling_params,
            pooling_metadata.pooling_states,
            cursor.get_finished_mask(),
            strict=True,
        ):
            start, first = end - count, int((params.extra_kwargs or {}).get("first", 1))
            if start == 0:  # also where vLLM had to begin again
                kept.clean()
            # the state at a place speaks of the token after it, which the last place does not have
            begin, last = max(start, first - 1), min(end, len(ids) - 1)
            if begin < last:
                targets = ids[begin + 1 : last + 1].to(states.device)
                found = self._scorer[0].token_logprobs(states[begin - start : last - start], targets)
                kept.hidden_states_cache.append(found.double().sum(0))
            total = sum(kept.hidden_states_cache, states.new_zeros(len(self._scorer[0].objectives)).double())
            sums.append(total if finished else None)
            if finished:
                kept.clean()
        return sums


def _logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(1, targets[:, None].long())[:, 0]
