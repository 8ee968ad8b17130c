"""The weights λ of vLLM's running requests, by their rows in its batch.

vLLM hands extra arguments of a request to its logits processors alone, which see all that the batch does: this one
keeps the rows' weights for the model. The interface may change with vLLM's next version; nothing else here uses it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from mpo_ray.policies.mixture_config import MixtureConfig
from mpo_ray.records import check_weights, parse_weights

#: The extra argument that holds λ: by objective, or as text, `helpful=0.7,harmless=0.3`.
WEIGHTS = "mixture_weights"


#: Of the mixture that this process serves, for checking requests before they reach the engine.
_objectives: list[str] = []
_newest: list[RequestWeights] = []


def expect(objectives: Sequence[str]) -> None:
    """Have requests checked against these objectives."""
    _objectives[:] = objectives


def read_weights(given: Any, objectives: Sequence[str]) -> list[float]:
    """λ in the order of the objectives. given: by name, as text, or a number for each. Raises ValueError."""
    if isinstance(given, str):
        given = parse_weights(given, where=WEIGHTS)
    if isinstance(given, Mapping):
        return list(check_weights(given, objectives, where=WEIGHTS).values())
    if not isinstance(given, list | tuple) or not all(isinstance(value, int | float) for value in given):
        raise ValueError(f"{WEIGHTS}: {given!r} is no set of weights; write helpful=0.7,harmless=0.3.")
    if len(given) != len(objectives) or not all(math.isfinite(value) for value in given):
        raise ValueError(f"{WEIGHTS}: {given!r}; a list needs a finite number for each of {', '.join(objectives)}.")
    return [float(value) for value in given]


class RequestWeights(LogitsProcessor):  # type: ignore[misc]
    """λ of every row of the batch: the request's own, or the artefact's.

    It also takes away the columns that `model` adds to the logits, once vLLM has kept what they say.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        config = vllm_config.model_config.hf_config
        self._objectives = config.objectives if isinstance(config, MixtureConfig) else None
        if self._objectives is None:  # vLLM serves another model, and this processor has nothing to do
            return
        self._vocab_size: int = config.vocab_size
        self._default = torch.tensor(list(config.weights.values()))
        rows = self._default.repeat(vllm_config.scheduler_config.max_num_seqs, 1)
        self._rows = rows
        self._on_device = rows.to(device)
        _newest[:] = [self]

    @staticmethod
    def newest() -> RequestWeights:
        """That of the engine which is being built: vLLM makes the processors of an engine before its model."""
        return _newest[0]

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        given = (sampling_params.extra_args or {}).get(WEIGHTS)
        if given is not None:
            read_weights(given, _objectives)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if self._objectives is None or batch_update is None:
            return
        for row, params, _, _ in batch_update.added:
            given = (params.extra_args or {}).get(WEIGHTS)
            self._rows[row] = self._default if given is None else torch.tensor(read_weights(given, self._objectives))
        for first, second, direction in batch_update.moved:
            if direction == MoveDirectionality.SWAP:
                self._rows[[first, second]] = self._rows[[second, first]]
            else:
                self._rows[second] = self._rows[first]
        self._on_device.copy_(self._rows)

    def apply(self, logits: Tensor) -> Tensor:
        return logits if self._objectives is None else logits[:, : self._vocab_size]

    def of_tokens(self, num_tokens: int) -> Tensor:
        """λ of every token of the pass, (T, K): that of the request it belongs to."""
        metadata: Any = get_forward_context().attn_metadata
        if not metadata:  # a pass of vLLM's own, to measure memory
            return self._on_device[:1].expand(num_tokens, -1)
        starts = next(iter(metadata.values())).query_start_loc
        places = torch.arange(num_tokens, device=starts.device, dtype=starts.dtype)
        rows = torch.bucketize(places, starts[1:], right=True).clamp_(max=len(self._on_device) - 1)
        return self._on_device[rows]
