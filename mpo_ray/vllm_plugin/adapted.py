"""K LoRA adapters on one vLLM model: its layers are given the rows of all policies end to end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from mpo_ray.policies.adapters import Factors, StackedFactors, add_products, stacked_factors
from mpo_ray.policies.loading import ModelError
from mpo_ray.policies.lora_file import read_lora
from mpo_ray.policies.packed_linear import PackedLinear, can_pack, packs_by_mkl


class StackedAttention(nn.Module):
    """The same attention layer of several policies: the rows of the first, then those of the next, …"""

    def __init__(self, layers: Sequence[Any], *, compiled: bool) -> None:
        """compiled: whether a compiler wants to see attention as one operator; without it, a plain call is shorter."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        for layer in layers:
            layer.use_direct_call = layer.use_direct_call or not compiled

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        num = len(self.layers)
        parts = zip(query.chunk(num), key.chunk(num), value.chunk(num), strict=True)
        return torch.cat([layer(*part) for layer, part in zip(self.layers, parts, strict=True)])


class AdaptedLinear(nn.Module):
    """W x_k + B_k A_k x_k for the rows of every policy k, the scaling folded into B_k."""

    def __init__(self, linear: LinearBase, down: Tensor, ups: Sequence[Tensor]) -> None:
        """As of `stacked_factors`, of this rank's part of the layer."""
        super().__init__()
        self.linear = linear
        self.factors = StackedFactors(down, ups)
        self._policies = tuple(range(len(down)))
        self._sums = isinstance(linear, RowParallelLinear) and linear.tp_size > 1

    def forward(self, inputs: Tensor) -> Any:
        outputs, bias = self.linear(inputs)
        num = len(self._policies)
        down, ups = self.factors.of(self._policies)
        projected = torch.bmm(inputs.view(num, -1, inputs.shape[-1]), down)
        if self._sums:
            projected = tensor_model_parallel_all_reduce(projected)
        add_products(outputs.view(num, -1, outputs.shape[-1]), projected, ups)
        return outputs, bias


class PackedMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """Products of a weight that MKL packs for the rows of several policies, in the place of vLLM's own, by oneDNN."""

    def process_weights_after_loading(self, layer: Any) -> None:
        whole = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=False, device="meta")
        whole.weight = layer.weight
        layer.packed = PackedLinear(whole)
        layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        product: Tensor = layer.packed(x)
        return product if bias is None else product + bias


def add_adapters(base: nn.Module, paths: Sequence[Path]) -> None:
    """Put the adapters on the model, whose weights are loaded. Raises ModelError for layers that it does not have."""
    files = [read_lora(path) for path in paths]
    packed: dict[str, list[str]] = getattr(base, "packed_modules_mapping", {})
    wanted = {name for file in files for name in file.factors}
    for name, linear in list(base.named_modules()):
        if not isinstance(linear, LinearBase):
            continue
        parent, _, leaf = name.rpartition(".")
        names = [f"{parent}.{part}" for part in packed.get(leaf, [leaf])]
        if not wanted & {*names}:
            continue
        wanted -= {*names}
        factors = [[file.factors.get(part) for part in names] for file in files]
        setattr(base.get_submodule(parent), leaf, _adapted(name, linear, factors))
    if wanted:
        raise ModelError(
            f"{paths[0].parent}: the adapters change {min(wanted)!r}, which vLLM's {type(base).__name__} does not have "
            "as a linear layer. Decode this mixture with engine: mpo, or merge the adapters into full weights."
        )


def _adapted(name: str, linear: LinearBase, factors: Sequence[Sequence[Factors | None]]) -> AdaptedLinear:
    """With this rank's part of the factors: of B where the outputs are divided, of A where the inputs are."""
    if isinstance(linear, QKVParallelLinear):
        heads, shared = linear.head_size * linear.total_num_heads, linear.head_size * linear.total_num_kv_heads
        sizes = [heads, shared, shared]
    elif isinstance(linear, MergedColumnParallelLinear):
        sizes = list(linear.output_sizes)
    elif isinstance(linear, ColumnParallelLinear | RowParallelLinear | ReplicatedLinear):
        sizes = [linear.output_size]
    else:
        raise ModelError(f"{name}: adapters on a {type(linear).__name__} are not supported with vLLM; use engine: mpo.")
    like: Any = linear.weight
    down, ups = stacked_factors(sizes, linear.input_size, factors, like)
    if linear.tp_size > 1:
        rank = get_tensor_model_parallel_rank()
        if isinstance(linear, RowParallelLinear):
            down = down.chunk(linear.tp_size, dim=1)[rank].contiguous()
        elif not isinstance(linear, ReplicatedLinear):
            copies = getattr(linear, "num_kv_head_replicas", 1)
            for number, up in enumerate(ups):
                among = linear.tp_size // copies if number > 0 else linear.tp_size
                ups[number] = up.chunk(among, dim=2)[rank // copies if number > 0 else rank].contiguous()
    if like.dtype == torch.float32 and can_pack(linear) and packs_by_mkl():
        linear.quant_method = PackedMethod()
    return AdaptedLinear(linear, down, ups)
