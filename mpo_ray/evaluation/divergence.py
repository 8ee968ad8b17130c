"""How far a candidate is from the reference along its own completions, and what its decoding drops on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mpo_ray.data.tokens import TokenBatch, collate, shared_prompts
from mpo_ray.maths.log_linear import log_normalizer
from mpo_ray.maths.sequence_logprob import sequence_kl, sum_over_completions, token_logprobs
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.policies.mixture import MixtureForCausalLM

#: (prompt ids, completion ids)
Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]


@torch.no_grad()
def divergences(
    model: Any, reference: Any, sequences: Sequences, *, batch_size: int, pad_id: int
) -> tuple[list[float], list[float]]:
    """Σ_t KL(q_t ‖ π_ref,t) and Σ_t log Z_t along every completion, nats   (design 2.3, 2.5)

    The second is 0 for a plain model, and 0 up to rounding for a mixture at a vertex. The completions are the model's
    own, decoded token by token.
    """
    kl, log_z = [0.0] * len(sequences), [0.0] * len(sequences)
    for rows, batch in _batches(sequences, batch_size, pad_id, reference.device):
        logits = completion_logits(model, batch)
        distances = sequence_kl(logits, completion_logits(reference, batch), batch.completion_mask).tolist()
        dropped = [0.0] * len(rows)
        if isinstance(model, MixtureForCausalLM):
            dropped = sum_over_completions(log_normalizer(logits), batch.completion_mask).tolist()
        for i, distance, normalizer in zip(rows, distances, dropped, strict=True):
            kl[i], log_z[i] = distance, normalizer
    return kl, log_z


@torch.no_grad()
def tilts(
    mixture: MixtureForCausalLM, reference: Any, sequences: Sequences, *, batch_size: int, pad_id: int
) -> list[float]:
    """Σ_k λ_k log π_k(y|x) − log π_ref(y|x) of every completion, nats: log π_λ/π_ref + log Z   (eq. 2)

    Of completions of π_λ, its mean less log Z is KL(π_λ ‖ π_ref). An estimate log Ẑ in the place of log Z is somewhat
    low (E[log Ẑ] ≤ log Z), which makes the KL somewhat high.
    """
    found = [0.0] * len(sequences)
    for rows, batch in _batches(sequences, batch_size, pad_id, reference.device):
        tokens = batch.input_ids[batch.completion_mask][:, None]
        ours = completion_logits(mixture, batch).gather(-1, tokens)[:, 0]
        theirs = token_logprobs(completion_logits(reference, batch), tokens[:, 0])
        for i, tilt in zip(rows, sum_over_completions(ours - theirs, batch.completion_mask).tolist(), strict=True):
            found[i] = tilt
    return found


def _batches(
    sequences: Sequences, batch_size: int, pad_id: int, device: torch.device
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Places of the sequences and the sequences, the shortest first; a batch's longest is at most a fifth longer.

    A mixture computes padding like any token, and most of a batch of all lengths is padding. Only the places that
    predict a completion's token go through the output layer.
    """
    lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or len(groups[-1]) == batch_size or lengths[place] > 1.2 * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(place)
    for rows in groups:
        chosen = [sequences[i] for i in rows]
        yield rows, replace(collate(chosen, pad_id=pad_id), prompt_rows=shared_prompts(chosen)).to(device)


def completion_logits(model: Any, batch: TokenBatch) -> Tensor:
    """Logits (N, V) that predict the completions' N tokens, row after row; for a mixture Σ_k λ_k log π_k."""
    source = model if isinstance(model, MixtureForCausalLM) else CompletionModel(model)
    return source.predictions(batch)
