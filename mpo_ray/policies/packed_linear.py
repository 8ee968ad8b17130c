"""Linear layers whose weights lie as a CPU multiplies few rows fastest.

A step of decoding multiplies a few rows by every weight. A weight that is laid out once for that, by MKL on Intel's
processors and by oneDNN on others, where MKL takes up to twice as long, takes less time from a few rows on than the
plain product, which `generate` uses (benchmarks/decoding.py, 16 requests). In bfloat16 it is oneDNN, on processors for
which it can, if a timed product takes less time so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mpo_ray.policies.one_input import join_linears
from mpo_ray.policies.precision import example
from mpo_ray.policies.timed import shortest_seconds

#: MKL lays a weight out for so many rows. Told of few it takes longer for many, but not the other way.
MKL_ROWS = 256


class PackedLinear(nn.Module):
    """y = W x + b on the CPU, for inference, in a precision of `can_pack`.

    `out_features` and `in_features` as of `nn.Linear`; `num_bytes`: of the weight, which cannot be asked.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.num_bytes = weight.nbytes
        self._by_mkl = weight.dtype == torch.float32 and packs_by_mkl()
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
    """Whether this machine packs, and the model is one that can be: on the CPU, in float32 or in bfloat16."""
    first = next(model.parameters())
    if first.device.type != "cpu":
        return False
    if first.dtype == torch.bfloat16:
        return _packs_bfloat16()
    return first.dtype == torch.float32 and (_has_mkl() or _has_onednn())


def packs_by_mkl() -> bool:
    """Whether it is MKL that packs float32 on this machine, and not oneDNN."""
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


@cache
def _packs_bfloat16() -> bool:
    """Whether oneDNN packs it for this processor, and takes less time then. Without AMX and AVX-512 it does not."""
    if not (_has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    rows, weight = example(torch.bfloat16)
    columns, outputs = weight.shape[1], weight.shape[0]
    plain = nn.Linear(columns, outputs, bias=False, dtype=torch.bfloat16)
    ways = {"plain": plain, "packed": PackedLinear(plain)}
    with torch.inference_mode():
        seconds = shortest_seconds({name: partial(way, rows) for name, way in ways.items()})
    return seconds["packed"] < seconds["plain"]


def _has_mkl() -> bool:
    available: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkl, "_mkl_linear")


def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def _is_intel() -> bool:
    processor = Path("/proc/cpuinfo")
    return processor.is_file() and "GenuineIntel" in processor.read_text(encoding="utf-8")
