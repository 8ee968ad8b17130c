"""Log-probabilities of whole sequences under a causal language model, and the divergence along them.

Takes logits, token ids and the mask of the completion; knows nothing of models, tokenizers or batches. Position t of
the logits predicts token t + 1, so the first input token has no probability here: it is never a completion token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Logits that `token_logprobs` looks at together: 64 MiB of float32.
MOST_LOGITS_AT_ONCE = 2**24


def prediction_mask(completion_mask: Tensor) -> Tensor:
    """Where the logits predict a completion's token: one position before it. (B, T) bool → (B, T) bool."""
    mask = torch.zeros_like(completion_mask)
    mask[:, :-1] = completion_mask[:, 1:]
    return mask


def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Compute log π(y_t | y_<t) of given tokens   (design 2.1)

    log π(y_t | y_<t) = logit(y_t) − logsumexp_v logit(v)

    logits: (N, V), unnormalised, any float type; row n is the distribution of token n
    token_ids: (N,)
    Returns (N,) float32, nats. Forward and backward take some rows at a time, so that no second copy of the logits is
    made or kept: the gradient alone is as large as they are.
    """
    return _TokenLogprobs.apply(logits, token_ids)  # type: ignore[no-any-return, no-untyped-call]


class _TokenLogprobs(torch.autograd.Function):
    """`token_logprobs`, with ∂ log π(y_t) / ∂ logit(v) = [v = y_t] − π(v)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor) -> Tensor:
        chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1).float()
        normalizers = torch.empty_like(chosen)
        for rows in _blocks(logits):
            normalizers[rows] = logits[rows].float().logsumexp(-1)
        ctx.save_for_backward(logits, token_ids, normalizers)
        return chosen - normalizers

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, token_ids, normalizers = ctx.saved_tensors
        gradient = gradients[0].unsqueeze(-1)
        result = torch.empty_like(logits)
        for rows in _blocks(logits):
            probabilities = (logits[rows].float() - normalizers[rows].unsqueeze(-1)).exp_()
            slope = probabilities.mul_(-gradient[rows])
            result[rows] = slope.scatter_add_(-1, token_ids[rows].unsqueeze(-1), gradient[rows])
        return result, None


def _blocks(logits: Tensor) -> list[slice]:
    size = max(1, MOST_LOGITS_AT_ONCE // logits.shape[-1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def sequence_logprob(
    logits: Tensor, input_ids: Tensor, completion_mask: Tensor, *, length_normalized: bool = False
) -> Tensor:
    """Compute log π(y | x) = Σ_t log π(y_t | x, y_<t) of the completion in every row   (design 2.1)

    logits: (N, V), unnormalised: the predictions of the N completion tokens, row after row (at `prediction_mask`)
    input_ids: (B, T) prompt, completion and padding
    completion_mask: (B, T) bool, true where the input token belongs to the completion, its end token included
    length_normalized: the mean over the completion's tokens instead of the sum
    Returns (B,) float32, nats (nats per token where length-normalised). An empty completion has log-probability 0.
    """
    total = sum_over_completions(token_logprobs(logits, input_ids[completion_mask]), completion_mask)
    return total / completion_mask.sum(-1).clamp(min=1) if length_normalized else total


def sequence_kl(logits: Tensor, reference_logits: Tensor, completion_mask: Tensor) -> Tensor:
    """Compute Σ_t KL(q(· | x, y_<t) ‖ π_ref(· | x, y_<t)) along every completion   (design 2.5)

    KL_t = Σ_v q(v) (logit_q(v) − logit_ref(v)) − logsumexp logit_q + logsumexp logit_ref

    logits: (N, V) of q, unnormalised: the predictions of the N completion tokens, row after row
    reference_logits: (N, V) of π_ref, unnormalised, at the same places
    completion_mask: (B, T) bool, true where the input token belongs to the completion, its end token included
    Returns (B,) float32, nats, never negative. Where the completions are drawn from q, its mean estimates KL(q ‖ π_ref)
    between whole responses without bias, as the mean of log q − log π_ref does, with less variance.
    """
    return sum_over_completions(token_kl(logits, reference_logits), completion_mask)


def token_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Compute KL(q_t ‖ π_ref,t) at every place: the terms of `sequence_kl`, and what distillation minimises.

    logits: (N, V) of q, reference_logits: (N, V) of π_ref, both unnormalised
    Returns (N,) float32, nats, never negative. Its gradient in the reference's logits is π_ref,t − q_t.
    """
    terms = []
    for rows in _blocks(logits):
        ours, theirs = logits[rows].float(), reference_logits[rows].float()
        normalizer = ours.logsumexp(-1, keepdim=True)
        probabilities = (ours - normalizer).exp()
        products = torch.where(probabilities > 0, probabilities * (ours - theirs), 0.0)
        terms.append(products.sum(-1) - normalizer.squeeze(-1) + theirs.logsumexp(-1))
    return torch.cat(terms).clamp(min=0.0) if terms else logits.new_zeros(0, dtype=torch.float32)


def sum_over_completions(values: Tensor, completion_mask: Tensor) -> Tensor:
    """Sum a value per completion token within each row: (N,) and (B, T) bool → (B,). Row after row, as the logits."""
    return values.new_zeros(completion_mask.shape).masked_scatter(completion_mask, values).sum(-1)
