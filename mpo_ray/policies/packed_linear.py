"""Linear layers whose weights lie as a CPU multiplies few rows fastest.

A step of decoding multiplies a few rows by every weight. A weight that is laid out once for that, by MKL on Intel's
processors and by oneDNN on others, where MKL takes up to twice as long, takes less time from a few rows on than the
plain product, which `generate` uses (benchmarks/decoding.py, 16 requests).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from mpo_ray.policies.one_input import join_linears

#: MKL lays a weight out for so many rows. Told of few it takes longer for many, but not the other way.
MKL_ROWS = 256


class PackedLinear(nn.Module):
    """y = W x + b in float32 on the CPU, for inference. `out_features` and `in_features` as of `nn.Linear`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self._by_mkl = packs_by_mkl()
        if self._by_mkl:
            self._packed = torch.ops.mkl._mkl_reorder_linear_weight(weight.contiguous(), MKL_ROWS)
            # asked for its size alone, as long as the number of rows that is named is that of the input
            self._size = weight.new_empty(1).expand(weight.shape)
        else:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor
        if self._by_mkl:
            num_rows = inputs.numel() // self.in_features
            result = torch.ops.mkl._mkl_linear(inputs, self._packed, self._size, self.bias, num_rows)
        else:
            result = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self.bias, "none", [], "")
        return result


def can_pack(model: nn.Module) -> bool:
    """Whether this machine packs, and the model is one that can be: float32 on the CPU."""
    first = next(model.parameters())
    return (_has_mkl() or _has_onednn()) and first.device.type == "cpu" and first.dtype == torch.float32


def packs_by_mkl() -> bool:
    """Whether it is MKL that packs on this machine, and not oneDNN."""
    return _has_mkl() and (_is_intel() or not _has_onednn())


def pack_linears(model: nn.Module) -> None:
    """Replace every `nn.Linear` in the model; those with one input are packed as one.

    A weight that is shared with the embeddings stays there as well.
    """
    join_linears(model, PackedLinear)


class _OnlyCalled(nn.Module):
    """A linear layer that shows nothing of itself, as a packed one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._call = linear.forward

    def forward(self, inputs: Tensor) -> Tensor:
        return self._call(inputs)


@contextmanager
def only_called(model: nn.Module) -> Iterator[None]:
    """Let every `nn.Linear` of the model have no weight that could be read, while the block runs."""
    places = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    for parent, name, child in places:
        setattr(parent, name, _OnlyCalled(child))
    try:
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


def _has_mkl() -> bool:
    available: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkl, "_mkl_linear")


def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def _is_intel() -> bool:
    processor = Path("/proc/cpuinfo")
    return processor.is_file() and "GenuineIntel" in processor.read_text(encoding="utf-8")
