"""Linear layers whose weights lie as a CPU multiplies few rows fastest: twice the speed of a plain layer, and more.

A step of decoding multiplies a few rows by every weight. oneDNN reorders a weight once, to blocks, and then takes about
as long for eight rows as for one; the plain product of torch takes two to three times that (benchmarks/decoding.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """y = W x + b in float32 on the CPU, for inference. `out_features` and `in_features` as of `nn.Linear`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self.bias, "none", [], "")
        return result


def can_pack(model: nn.Module) -> bool:
    """Whether this machine packs, and the model is one that can be: float32 on the CPU."""
    first = next(model.parameters())
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and first.device.type == "cpu"
        and first.dtype == torch.float32
    )


def pack_linears(model: nn.Module) -> None:
    """Replace every `nn.Linear` in the model. A weight that is shared with the embeddings stays there as well."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
