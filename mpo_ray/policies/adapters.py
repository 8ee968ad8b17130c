"""K LoRA adapters stacked on one base, so that K policies are K groups of rows of one forward pass.

The base's product is one for all rows; each adapter adds its part by two batched products. Knows nothing of weights λ,
tokens or caches; `lora_file` says which adapters can be stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mpo_ray.policies.linear_layers import as_linear, layer_sizes, linear_layers
from mpo_ray.policies.loading import ModelError
from mpo_ray.policies.lora_file import LoraFile, read_lora
from mpo_ray.policies.one_input import groups_with_one_input, replace_by_one, side_by_side
from mpo_ray.records import REFERENCE

#: A (r, in) and B (out, r) of one adapter's layer, the scaling folded into B.
Factors = tuple[Tensor, Tensor]

_BASE = -1


@dataclass(frozen=True, slots=True)
class _Groups:
    """The groups of the forward pass that this thread (or task) is in: of which adapter each is, `_BASE` for none.

    sizes: rows of each group where they differ, else None
    """

    adapters: tuple[int, ...] = (_BASE,)
    sizes: tuple[int, ...] | None = None

    @property
    def first(self) -> int:
        """The first group that has an adapter: the reference's rows are complete as they are."""
        return int(self.adapters[0] == _BASE)


_NO_GROUPS = _Groups()
_GROUPS: ContextVar[_Groups] = ContextVar("adapter_groups", default=_NO_GROUPS)


class AdapterStack(nn.Module):
    """A causal LM and the LoRA adapters on it, by name; the name `reference` is the base without an adapter.

    The groups of a call belong to the thread that runs it: several threads may use one stack at a time, for different
    policies. Inference only.
    """

    def __init__(self, base: PreTrainedModel, adapters: Mapping[str, str | Path]) -> None:
        """Put the adapters at these places on `base`, whose linear layers are replaced. Raises ModelError."""
        super().__init__()
        files = [read_lora(path) for path in adapters.values()]
        self._places = {REFERENCE: _BASE} | {name: index for index, name in enumerate(adapters)}
        _check_fit(base, files)
        adapted = {name for file in files for name in file.factors}
        for names in groups_with_one_input(base, adapted):
            layers = [as_linear(base.get_submodule(name)) for name in names]
            stacked = StackedLinear(layers, [[file.factors.get(name) for name in names] for file in files])
            replace_by_one(base, names, stacked, [layer.out_features for layer in layers])
        self.base = base.requires_grad_(False)

    @property
    def names(self) -> list[str]:
        """The adapters, in order."""
        return [name for name in self._places if name != REFERENCE]

    def forward(self, names: Sequence[str], **inputs: Any) -> Any:
        """Run the base on rows that lie group after group: the first B rows under names[0], the next under names[1], …

        names: some policies of this stack, each once; `reference`, if it is among them, comes first
        """
        with self.running(names):
            return self.base(**inputs)

    @contextmanager
    def running(self, names: Sequence[str], sizes: Sequence[int] | None = None) -> Iterator[PreTrainedModel]:
        """The base model, whose calls in this thread are calls of `forward` with these names while the block runs.

        sizes: how many rows each group has, or tokens where the batch is one row; None for groups of one size
        """
        if not names or len({*names}) < len(names) or REFERENCE in names[1:]:
            raise ValueError(f"the groups of rows are {list(names)}: name each policy once, and `reference` first.")
        uneven = None if sizes is None or len({*sizes}) == 1 else tuple(sizes)
        token = _GROUPS.set(_Groups(tuple(self._places[name] for name in names), uneven))
        try:
            yield self.base
        finally:
            _GROUPS.reset(token)


class StackedLinear(nn.Module):
    """y_g = W x_g + b + B_g A_g x_g for every group g of rows, the scaling folded into B_g.

    Several layers that are given the same x are one, their outputs side by side, with one W and one A_g; each has its
    own B_g. Ranks are padded with zeros to the largest; an adapter that leaves a layer alone is all zeros there.
    """

    def __init__(self, layers: Sequence[nn.Linear], factors: Sequence[Sequence[tuple[Tensor, Tensor] | None]]) -> None:
        """factors: per adapter and layer A (r, in) and B (out, r), or None."""
        super().__init__()
        self.linear = side_by_side(layers)
        sizes = [layer.out_features for layer in layers]
        self.factors = StackedFactors(*stacked_factors(sizes, layers[0].in_features, factors, self.linear.weight))

    @property
    def weight(self) -> Tensor:
        """The base's, for models that read it; as in PEFT, an adapter changes nothing there."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: (…, in); whatever the leading dimensions, they hold the rows, or tokens, group after group.

        Some layers are given (rows, tokens, in), others (rows · tokens, in).
        """
        outputs: Tensor = self.linear(inputs)
        groups = _GROUPS.get()
        adapters, first = groups.adapters, groups.first
        if first == len(adapters):
            return outputs
        if groups.sizes is not None:
            self._add_uneven(inputs.flatten(0, -2), outputs.view(-1, outputs.shape[-1]), adapters, groups.sizes)
            return outputs
        flat = outputs.view(len(adapters), -1, outputs.shape[-1])
        rows = inputs.reshape(len(adapters), -1, inputs.shape[-1])
        if first:
            flat, rows, adapters = flat[first:], rows[first:], adapters[first:]
        down, ups = self.factors.of(adapters)
        add_products(flat, torch.bmm(rows, down), ups)
        return outputs

    def _add_uneven(self, inputs: Tensor, outputs: Tensor, adapters: tuple[int, ...], sizes: Sequence[int]) -> None:
        for adapter, rows, results in zip(
            adapters, inputs.split_with_sizes(sizes), outputs.split_with_sizes(sizes), strict=True
        ):
            if adapter != _BASE:
                down, *ups = (factors[adapter : adapter + 1] for factors in self.factors.buffers())
                add_products(results[None], rows[None] @ down, ups)


def stacked_factors(
    sizes: Sequence[int], in_features: int, factors: Sequence[Sequence[Factors | None]], like: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """A (K, in, Σ R_i) of layers i with one input, and B_i (K, R_i, sizes[i]) of each; R_i is its largest rank.

    factors: per adapter and layer. Zeros elsewhere.
    """
    ranks = [
        max((pair[0].shape[0] for pair in pairs if pair is not None), default=0) for pairs in zip(*factors, strict=True)
    ]
    down = like.new_zeros(len(factors), in_features, sum(ranks))
    ups = [like.new_zeros(len(factors), rank, size) for rank, size in zip(ranks, sizes, strict=True)]
    for index, pairs in enumerate(factors):
        for pair, up, columns in zip(pairs, ups, down[index].split_with_sizes(ranks, dim=-1), strict=True):
            if pair is not None:
                rank = pair[0].shape[0]
                columns[:, :rank] = pair[0].T
                up[index, :rank] = pair[1].T
    return down, ups


def add_products(outputs: Tensor, inner: Tensor, ups: Sequence[Tensor]) -> None:
    """Add to the outputs of layers that lie side by side, (K, rows, Σ sizes), `inner` (K, rows, Σ R_i) times each B_i.

    In place.
    """
    if len(ups) == 1:
        outputs.baddbmm_(inner, ups[0])
        return
    parts = outputs.split_with_sizes([up.shape[2] for up in ups], -1)
    for part, projected, up in zip(parts, inner.split_with_sizes([up.shape[1] for up in ups], -1), ups, strict=True):
        if part.is_cpu:  # there the products of a batch go one by one unless their results lie end to end
            part.add_(torch.bmm(projected, up))
        else:
            part.baddbmm_(projected, up)


class StackedFactors(nn.Module):
    """A and the B_i of every adapter, and of some: views where these lie side by side, else copies.

    What was given last is kept for the next call.
    """

    def __init__(self, down: Tensor, ups: Sequence[Tensor]) -> None:
        super().__init__()
        for number, factors in enumerate((down, *ups)):
            self.register_buffer(f"factors_{number}", factors, persistent=False)
        self._kept: tuple[tuple[int, ...], tuple[Tensor, Sequence[Tensor]]] | None = None

    def of(self, adapters: tuple[int, ...]) -> tuple[Tensor, Sequence[Tensor]]:
        kept = self._kept
        if kept is None or kept[0] != adapters:
            start, end = adapters[0], adapters[-1] + 1
            side_by_side = adapters == tuple(range(start, end))
            down, *ups = (
                factors[start:end] if side_by_side else factors[torch.tensor(adapters, device=factors.device)]
                for factors in self.buffers()
            )
            kept = self._kept = (adapters, (down, ups))
        return kept[1]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept = None  # the factors go to another device or precision
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]


def repeat_rows(rows: Tensor | None, num_groups: int) -> Tensor | None:
    """(B, …) → (groups · B, …), group after group: what each policy's rows are given."""
    return rows if rows is None or num_groups == 1 else rows.repeat(num_groups, *[1] * (rows.ndim - 1))


def _check_fit(base: PreTrainedModel, files: Sequence[LoraFile]) -> None:
    """Refuse adapters of layers that the base does not have, that are not linear, or that have another size."""
    ends = {id(module) for module in (base.get_input_embeddings(), base.get_output_embeddings())}
    layers = dict(base.named_modules())
    linear = linear_layers(base)
    for file in files:
        lacking = [name for name in linear if name not in file.factors and file.targets(name)]
        if lacking:
            raise ModelError(
                f"{file.path}: the adapter does not fit the reference model: it should adapt {lacking[0]!r}, as its "
                f"configuration says, but has no tensors for it ({len(lacking)} layers in all). Was it saved whole?"
            )
        for name, (down, up) in file.factors.items():
            layer = layers.get(name)
            if layer is None:
                raise ModelError(
                    f"{file.path}: the adapter does not fit the reference model: it adapts {name!r}, which a "
                    f"{type(base).__name__} does not have. Was it trained on another one?"
                )
            if id(layer) in ends:
                raise ModelError(
                    f"{file.path}: the adapter changes {name!r}, the embeddings or the output head; policies on one "
                    "base share these. Train it without that target module, or merge it into full weights."
                )
            if name not in linear:
                raise ModelError(
                    f"{file.path}: the adapter changes {name!r}, which is a {type(layer).__name__}; adapters can only "
                    "be stacked on Linear layers. Merge it into full weights."
                )
            inputs, outputs = layer_sizes(layer)
            if (up.shape[0], down.shape[1]) != (outputs, inputs):
                raise ModelError(
                    f"{file.path}: the adapter does not fit the reference model: {name!r} is {inputs} → {outputs}, "
                    f"the adapter's {down.shape[1]} → {up.shape[0]}. Was it trained on another one?"
                )
