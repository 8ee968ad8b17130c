"""The reference and the K policies, loaded once, as distributions over completions.

Adapters share one copy of the reference; policies with full weights are loaded beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel

from mpo_ray.data.tokens import collate
from mpo_ray.policies.loading import add_adapter, is_adapter, load_model
from mpo_ray.records import REFERENCE
from mpo_ray.training.completion_model import CompletionModel

#: (prompt ids, completion ids)
Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]


class PolicySet:
    """Models by name: `reference` and every objective. On the GPU where there is one."""

    def __init__(self, reference: str, policies: Mapping[str, str], *, precision: str = "fp32") -> None:
        base: Any = load_model(reference, precision=precision)
        self._full: dict[str, Any] = {}
        self._adapters: dict[str, str] = {}
        for index, (name, path) in enumerate(policies.items()):
            if is_adapter(path):
                self._adapters[name] = f"policy_{index}"  # an objective's name may be one that torch's modules use
                base = add_adapter(base, path, name=self._adapters[name])
            else:
                self._full[name] = load_model(path, precision=precision).to(_device())
        self._base = base.to(_device()).eval()

    @contextmanager
    def model(self, name: str) -> Iterator[Any]:
        """The causal LM of one policy, or of the reference, while the block runs."""
        if name in self._full:
            yield self._full[name]
        elif not isinstance(self._base, PeftModel):
            yield self._base
        elif name == REFERENCE:
            with self._base.disable_adapter():
                yield self._base
        else:
            self._base.set_adapter(self._adapters[name])
            yield self._base

    def logprobs(self, name: str, sequences: Sequences, *, batch_size: int, pad_id: int) -> list[float]:
        """log π_name(completion | prompt) of every sequence, nats, summed over the completion's tokens."""
        with self.model(name) as model:
            return sequence_logprobs(model, sequences, batch_size=batch_size, pad_id=pad_id)


@torch.no_grad()
def sequence_logprobs(model: Any, sequences: Sequences, *, batch_size: int, pad_id: int) -> list[float]:
    """log π(completion | prompt) of every sequence, nats: batches of like length, each sequence at its own place."""
    completions = CompletionModel(model)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]) + len(sequences[i][1]))
    values = [0.0] * len(sequences)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([sequences[i] for i in rows], pad_id=pad_id).to(model.device)
        for i, value in zip(rows, completions(batch).double().tolist(), strict=True):
            values[i] = value
    return values


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
