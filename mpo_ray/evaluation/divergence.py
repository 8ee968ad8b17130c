"""How far a candidate is from the reference along its own completions, and what its decoding drops on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mpo_ray.data.tokens import TokenBatch, collate, shared_prompts
from mpo_ray.maths.log_linear import log_normalizer
from mpo_ray.maths.sequence_logprob import sequence_kl, sum_over_completions
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.training.completion_model import CompletionModel

#: (prompt ids, completion ids)
Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]


@torch.no_grad()
def divergences(
    model: Any, reference: Any, sequences: Sequences, *, batch_size: int, pad_id: int
) -> tuple[list[float], list[float]]:
    """Σ_t KL(q_t ‖ π_ref,t) and Σ_t log Z_t along every completion, nats   (design 2.3, 2.5)

    The second is 0 for a plain model, and 0 up to rounding for a mixture at a vertex. Batches hold sequences of like
    length, and only the places that predict a completion's token go through the output layer.
    """
    kl, log_z = [0.0] * len(sequences), [0.0] * len(sequences)
    for rows in _batches([len(prompt) + len(completion) for prompt, completion in sequences], batch_size):
        chosen = [sequences[i] for i in rows]
        batch = replace(collate(chosen, pad_id=pad_id), prompt_rows=shared_prompts(chosen)).to(reference.device)
        logits = completion_logits(model, batch)
        distances = sequence_kl(logits, completion_logits(reference, batch), batch.completion_mask).tolist()
        dropped = [0.0] * len(rows)
        if isinstance(model, MixtureForCausalLM):
            dropped = sum_over_completions(log_normalizer(logits), batch.completion_mask).tolist()
        for i, distance, normalizer in zip(rows, distances, dropped, strict=True):
            kl[i], log_z[i] = distance, normalizer
    return kl, log_z


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Places of the sequences, the shortest first, in batches whose longest is at most a fifth longer than the first.

    A mixture computes padding like any token, and most of a batch of all lengths is padding.
    """
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == batch_size or lengths[place] > 1.2 * lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def completion_logits(model: Any, batch: TokenBatch) -> Tensor:
    """Logits (N, V) that predict the completions' N tokens, row after row; for a mixture Σ_k λ_k log π_k."""
    source = model if isinstance(model, MixtureForCausalLM) else CompletionModel(model)
    return source.predictions(batch)
