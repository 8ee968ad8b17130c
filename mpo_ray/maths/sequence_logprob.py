"""Log-probabilities of whole sequences under a causal language model, and the divergence along them.

Takes logits, token ids and the mask of the completion; knows nothing of models, tokenizers or batches. Position t of
the logits predicts token t + 1, so the first input token has no probability here: it is never a completion token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Compute log π(y_t | y_<t) of every input token but the first   (design 2.1)

    log π(y_t | y_<t) = logit(y_t) − logsumexp_v logit(v)

    logits: (B, T, V), unnormalised, any float type
    input_ids: (B, T) token ids
    Returns (B, T−1) float32, nats; column t is the token at position t + 1. Forward and backward take one text at a
    time, so that no second copy of the batch's logits is made or kept: the gradient alone is as large as they are.
    """
    return _TokenLogprobs.apply(logits, input_ids)  # type: ignore[no-any-return, no-untyped-call]


class _TokenLogprobs(torch.autograd.Function):
    """`token_logprobs`, with ∂ log π(y_t) / ∂ logit(v) = [v = y_t] − π(v)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, input_ids: Tensor) -> Tensor:
        chosen = torch.empty(logits.shape[0], logits.shape[1] - 1, dtype=torch.float32, device=logits.device)
        normalizers = torch.empty_like(chosen)
        for row, (row_logits, row_ids) in enumerate(zip(logits, input_ids, strict=True)):
            predictions = row_logits[:-1].float()
            normalizers[row] = predictions.logsumexp(-1)
            chosen[row] = predictions.gather(-1, row_ids[1:].unsqueeze(-1)).squeeze(-1)
        ctx.save_for_backward(logits, input_ids, normalizers)
        return chosen - normalizers

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, input_ids, normalizers = ctx.saved_tensors
        result = torch.zeros_like(logits)
        for row, gradient in enumerate(gradients[0].unsqueeze(-1)):
            probabilities = (logits[row, :-1].float() - normalizers[row].unsqueeze(-1)).exp_()
            slope = probabilities.mul_(-gradient).scatter_add_(-1, input_ids[row, 1:].unsqueeze(-1), gradient)
            result[row, :-1] = slope
        return result, None


def sequence_logprob(
    logits: Tensor, input_ids: Tensor, completion_mask: Tensor, *, length_normalized: bool = False
) -> Tensor:
    """Compute log π(y | x) = Σ_t log π(y_t | x, y_<t) of the completion in every row   (design 2.1)

    logits: (B, T, V), unnormalised
    input_ids: (B, T) prompt, completion and padding
    completion_mask: (B, T) bool, true where the input token belongs to the completion, its end token included
    length_normalized: the mean over the completion's tokens instead of the sum
    Returns (B,) float32, nats (nats per token where length-normalised). An empty completion has log-probability 0.
    """
    mask = completion_mask[:, 1:]
    total = token_logprobs(logits, input_ids).masked_fill(~mask, 0.0).sum(-1)
    return total / mask.sum(-1).clamp(min=1) if length_normalized else total


def sequence_kl(logits: Tensor, reference_logits: Tensor, completion_mask: Tensor) -> Tensor:
    """Compute Σ_t KL(q(· | x, y_<t) ‖ π_ref(· | x, y_<t)) along every completion   (design 2.5)

    logits: (B, T, V) of q, unnormalised
    reference_logits: (B, T, V) of π_ref, unnormalised
    completion_mask: (B, T) bool, true where the input token belongs to the completion, its end token included
    Returns (B,) float32, nats, never negative. Where the completions are drawn from q, its mean estimates KL(q ‖ π_ref)
    between whole responses without bias, as the mean of log q − log π_ref does, with less variance.
    """
    rows = []
    for row_logits, row_reference, row_mask in zip(logits, reference_logits, completion_mask, strict=True):
        logprobs = row_logits[:-1][row_mask[1:]].float().log_softmax(-1)
        reference = row_reference[:-1][row_mask[1:]].float().log_softmax(-1)
        probabilities = logprobs.exp()
        terms = torch.where(probabilities > 0, probabilities * (logprobs - reference), 0.0)
        rows.append(terms.sum())
    return torch.stack(rows)
