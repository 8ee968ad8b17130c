"""K LoRA adapters stacked on one base, so that K policies are K groups of rows of one forward pass.

The base's product is one for all rows; each adapter adds its part by two batched products. Knows nothing of weights λ,
tokens or caches; `lora_file` says which adapters can be stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mpo_ray.policies.loading import ModelError
from mpo_ray.policies.lora_file import LoraFile, read_lora
from mpo_ray.records import REFERENCE

_BASE = -1


class _Groups(NamedTuple):
    """The groups of the forward pass that this thread (or task) is in: of which adapter each is, `_BASE` for none.

    sizes: rows of each group where they differ, else None
    """

    adapters: tuple[int, ...] = ()
    sizes: tuple[int, ...] | None = None


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
        for name in sorted({name for file in files for name in file.factors}):
            parent, _, leaf = name.rpartition(".")
            layer = StackedLinear(base.get_submodule(name), [file.factors.get(name) for file in files])
            setattr(base.get_submodule(parent), leaf, layer)
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

    Ranks are padded with zeros to the largest; an adapter that leaves this layer alone is all zeros.
    """

    def __init__(self, linear: nn.Linear, factors: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        """factors: per adapter A (r, in) and B (out, r), or None."""
        super().__init__()
        self.linear = linear
        weight = linear.weight
        rank = max(pair[0].shape[0] for pair in factors if pair is not None)
        down = weight.new_zeros(len(factors), weight.shape[1], rank)
        up = weight.new_zeros(len(factors), rank, weight.shape[0])
        for index, pair in enumerate(factors):
            if pair is not None:
                down[index, :, : pair[0].shape[0]] = pair[0].T
                up[index, : pair[1].shape[1]] = pair[1].T
        self.down, self.up = nn.Buffer(down, persistent=False), nn.Buffer(up, persistent=False)
        self._selected: tuple[tuple[int, ...], torch.device, Tensor, Tensor] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: (rows, …, in), the rows a multiple of the number of groups; or (1, tokens, in), likewise.

        Groups of different sizes: (1, tokens, in), tokens group after group.
        """
        adapters, sizes = _GROUPS.get()
        outputs: Tensor = self.linear(inputs)
        if all(adapter == _BASE for adapter in adapters):
            return outputs
        if sizes is not None:
            parts = zip(adapters, inputs[0].split_with_sizes(sizes), outputs[0].split_with_sizes(sizes), strict=True)
            for adapter, rows, results in parts:
                if adapter != _BASE:
                    results.addmm_(rows @ self.down[adapter], self.up[adapter])
            return outputs
        flat = outputs.view(len(adapters), -1, outputs.shape[-1])
        grouped = inputs.reshape(len(adapters), -1, inputs.shape[-1])
        first = 1 if adapters[0] == _BASE else 0  # the reference's rows are complete
        down, up = self._factors(adapters[first:])
        flat[first:].baddbmm_(torch.bmm(grouped[first:], down), up)
        return outputs

    def _factors(self, groups: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """A and B of these adapters: views where they lie side by side, else a copy, kept for the next call."""
        start, end = groups[0], groups[-1] + 1
        if groups == tuple(range(start, end)):
            return self.down[start:end], self.up[start:end]
        kept = self._selected
        if kept is None or kept[:2] != (groups, self.down.device):
            index = torch.tensor(groups, device=self.down.device)
            kept = (groups, self.down.device, self.down[index], self.up[index])
            self._selected = kept
        return kept[2], kept[3]


def repeat_rows(rows: Tensor | None, num_groups: int) -> Tensor | None:
    """(B, …) → (groups · B, …), group after group: what each policy's rows are given."""
    return rows if rows is None or num_groups == 1 else rows.repeat(num_groups, *[1] * (rows.ndim - 1))


def _check_fit(base: PreTrainedModel, files: Sequence[LoraFile]) -> None:
    """Refuse adapters of layers that the base does not have, that are not linear, or that have another size."""
    ends = {id(module) for module in (base.get_input_embeddings(), base.get_output_embeddings())}
    layers = dict(base.named_modules())
    linear = [name for name, layer in layers.items() if type(layer) is nn.Linear and id(layer) not in ends]
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
            if type(layer) is not nn.Linear:
                raise ModelError(
                    f"{file.path}: the adapter changes {name!r}, which is a {type(layer).__name__}; adapters can only "
                    "be stacked on Linear layers. Merge it into full weights."
                )
            if (up.shape[0], down.shape[1]) != (layer.out_features, layer.in_features):
                raise ModelError(
                    f"{file.path}: the adapter does not fit the reference model: {name!r} is {layer.in_features} → "
                    f"{layer.out_features}, the adapter's {down.shape[1]} → {up.shape[0]}. Was it trained on another "
                    "one?"
                )
