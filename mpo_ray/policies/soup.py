"""Rewarded Soups: one model whose parameters are the weighted average of the policies' (arXiv 2306.04488).

    θ_λ = Σ_k λ_k θ_k,      θ_k = W + s_k B_k A_k  for a LoRA policy on the reference's weights W

What is averaged is each policy's *effective* weights, so for LoRA policies the products: W + Σ_k λ_k s_k B_k A_k. The
average of the factors, (Σ_k λ_k B_k)(Σ_k λ_k A_k), is another model, and not the parameter average of the policies.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mpo_ray.policies.loading import ModelError, is_adapter, load_model
from mpo_ray.policies.lora_file import read_lora
from mpo_ray.policies.merging import is_tied, load_merged_adapter, untie
from mpo_ray.policies.precision import PRECISIONS
from mpo_ray.records import check_weights


def load_soup(
    reference: str, policies: Mapping[str, str], weights: Mapping[str, float], *, precision: str = "fp32"
) -> PreTrainedModel:
    """Open the parameter average of the policies as a plain transformers model, in evaluation mode, on the CPU.

    policies: objective → LoRA adapter of `reference`, or full weights; both kinds may be mixed
    weights: λ by objective, on the simplex; a policy with weight 0 is not opened
    Where one policy's output layer is not its input embeddings, neither is the soup's: both are averages of their own.
    Averaged in float32, and rounded to `precision` once, at the end. Two models are in memory at a time. Raises
    ModelError where the policies have no common parameters, ValueError where λ is not on the simplex.
    """
    checked = check_weights(weights, list(policies), where="the soup's weights")
    shares = {name: weight for name, weight in checked.items() if weight > 0}
    first, *others = shares
    soup = load_merged(policies[first], reference)
    average = soup.state_dict()
    with torch.no_grad():
        for tensor in _once(average).values():
            tensor.mul_(shares[first])
        for name in others:
            policy = load_merged(policies[name], reference)
            if is_tied(soup) and not is_tied(policy):
                untie(soup)
                average = soup.state_dict()
            _add(average, policy.state_dict(), shares[name], names=(first, name))
            del policy
            gc.collect()  # a model refers to itself; without this the third is opened beside the second
    return soup.to(PRECISIONS[precision]).eval()


def soup_factors(
    policies: Mapping[str, str | Path], weights: Mapping[str, float], *, rank: int | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors A (r, in) and B (out, r) of Σ_k λ_k s_k B_k A_k by layer, the soup of LoRA policies as one adapter.

    rank: of the best approximation, by the largest singular values; None for the sum of the policies' ranks, where it
    is exact. A layer's factors have a lower rank where its policies' ranks sum to less.
    Raises ModelError for an adapter that is more than its factors.
    """
    stacked: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, path in policies.items():
        if weights[name] > 0:
            for layer, (a, b) in read_lora(path).factors.items():
                stacked.setdefault(layer, []).append((a, weights[name] * b))
    found = {}
    for layer, pairs in stacked.items():
        wide, tall = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)
        rows, inner_rows = torch.linalg.qr(wide.T)
        columns, inner_columns = torch.linalg.qr(tall)
        left, values, right = torch.linalg.svd(inner_columns @ inner_rows.T)
        roots = values[:rank].sqrt()
        a = roots[:, None] * (right[: len(roots)] @ rows.T)
        found[layer] = (a, (columns @ left[:, : len(roots)]) * roots)
    return found


def load_merged(path: str, reference: str) -> PreTrainedModel:
    """Open a policy as a plain model in float32: an adapter is added into a copy of the reference's weights."""
    return load_merged_adapter(path, reference) if is_adapter(path) else load_model(path)


def _add(average: dict[str, Tensor], other: Mapping[str, Tensor], weight: float, *, names: tuple[str, str]) -> None:
    """average ← average + weight · other, tensor by tensor; a tensor that two names share is counted once."""
    for key in sorted(average.keys() | other.keys()):
        shapes = [tuple(state[key].shape) if key in state else None for state in (average, other)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"Policies {names[0]!r} and {names[1]!r} have no parameter average: {key} has the shapes {shapes[0]} "
                f"and {shapes[1]}. Train them from the same base model, or set evaluation.soups to false."
            )
    for key, tensor in _once(average).items():
        if tensor.is_floating_point():
            tensor.add_(other[key], alpha=weight)


def _once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point tensors of a state, each under the first of its names."""
    first: dict[int, str] = {}
    for key, tensor in state.items():
        if tensor.is_floating_point():
            first.setdefault(tensor.data_ptr(), key)
    return {key: state[key] for key in first.values()}
