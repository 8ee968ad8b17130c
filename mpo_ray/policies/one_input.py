"""Layers of a module that are given the same input, computed as one: few large products take less time than many."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

#: Layers that are given the same tensor wherever a module has them.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Computed(threading.local):
    """The input and the outputs of whole layers of which some parts are still to be called, in this thread."""

    def __init__(self) -> None:
        self.of: dict[nn.Module, tuple[Tensor, Sequence[Tensor]]] = {}


_COMPUTED = _Computed()


class _Part(nn.Module):
    """One of the layers that are one, in its place in the model. The first that is called computes them all.

    What it computed is the others' if their input is the very same tensor; the last layer lets go of it.
    """

    def __init__(self, whole: nn.Module, sizes: Sequence[int], number: int) -> None:
        super().__init__()
        self.whole, self._sizes, self._number = whole, list(sizes), number

    def forward(self, inputs: Tensor) -> Tensor:
        computed = _COMPUTED.of
        found = computed.get(self.whole)
        if found is None or found[0] is not inputs:
            found = computed[self.whole] = (inputs, self.whole(inputs).split(self._sizes, dim=-1))
        if self._number == len(self._sizes) - 1:
            computed.pop(self.whole, None)
        return found[1][self._number]


def groups_with_one_input(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """Of the linear layers of these names, those that are given the same input together; the others alone."""
    wanted, together = {*names}, []
    for parent, _ in model.named_modules():
        for siblings in _SIBLINGS:
            found = [name for leaf in siblings if (name := f"{parent}.{leaf}") in wanted]
            if len(found) > 1:
                together.append(found)
    alone = wanted - {name for found in together for name in found}
    return together + [[name] for name in sorted(alone)]


def replace_by_one(model: nn.Module, names: Sequence[str], whole: nn.Module, sizes: Sequence[int]) -> None:
    """Put `whole` in the place of the layers of these names; its outputs are theirs, side by side.

    sizes: how many outputs each of them has
    """
    for number, name in enumerate(names):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, whole if len(names) == 1 else _Part(whole, sizes, number))


def side_by_side(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One layer whose outputs are those of these layers, one after the other. One layer is itself."""
    if len(layers) == 1:
        return layers[0]
    weight = torch.cat([layer.weight.detach() for layer in layers])
    whole = nn.Linear(
        weight.shape[1], weight.shape[0], bias=any(layer.bias is not None for layer in layers), device="meta"
    )
    whole.weight = nn.Parameter(weight, requires_grad=False)
    if whole.bias is not None:
        biases = [
            weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers
        ]
        whole.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return whole


def join_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace every `nn.Linear` of the model by what `make` gives for it, those with one input by one."""
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    for names in groups_with_one_input(model, layers):
        group = [layers.pop(name) for name in names]
        replace_by_one(model, names, make(side_by_side(group)), [layer.out_features for layer in group])
