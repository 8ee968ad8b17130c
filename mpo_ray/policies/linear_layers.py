"""Which layers of a model an adapter can be added to: those that multiply by a weight, whatever their class.

The embeddings and the output head are left out: policies that share a base share these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """The layers y = W x + b of a causal language model by name, in its order. They may be on the meta device."""
    ends = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and id(layer) not in ends and _multiplies(layer)
    }


def layer_sizes(layer: nn.Module) -> tuple[int, int]:
    """How many inputs and outputs a layer of `linear_layers` has."""
    if isinstance(layer, Conv1D):
        return int(layer.nx), int(layer.nf)
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def as_linear(layer: nn.Module) -> nn.Linear:
    """A layer of `linear_layers` as a plain `nn.Linear`, with the same weight, or a transposed copy for a `Conv1D`."""
    if type(layer) is nn.Linear:
        return layer
    inputs, outputs = layer_sizes(layer)
    bias: Any = layer.bias
    plain = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    weight: Any = layer.weight
    if isinstance(layer, Conv1D):
        weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=False)
    plain.weight = weight
    if bias is not None:
        plain.bias = bias
    return plain


@torch.no_grad()
def _multiplies(layer: nn.Module) -> bool:
    """Whether a layer is no more than its class says: a router may be a `Linear` that gives more than a product."""
    if type(layer) in (nn.Linear, Conv1D):
        return True
    plain = as_linear(layer)
    probe = torch.linspace(-1, 1, plain.in_features, dtype=plain.weight.dtype, device=plain.weight.device)[None]
    found, expected = layer(probe), plain(probe)
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return False
    return found.is_meta or torch.allclose(found, expected, rtol=1e-2, atol=1e-2)
