"""Key-value caches for decoding: layers that grow without copying their past, and the cache of a mixture's policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

#: Spare places that a layer makes room for, when it must grow, as a share of its length, and at least.
SPARE_SHARE, SPARE_AT_LEAST = 0.25, 16


def growing_cache(config: Any) -> DynamicCache:
    """An empty cache for a model with this configuration, whose full-attention layers are `GrowingLayer`s."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A `DynamicLayer` with room for more tokens: a step writes its keys and values, and does not copy all before it.

    `keys` and `values` (rows, heads, tokens, d) are views of the beginnings of larger tensors.
    """

    keys: Any
    values: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change_rows(lambda room: room.index_select(0, beam_idx.to(room.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_rows(lambda room: room.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_rows(lambda room: room[indices.to(room.device)])

    def _append(self, name: str, past: Tensor, new: Tensor) -> Tensor:
        length = past.shape[-2] if past.numel() else 0
        total = length + new.shape[-2]
        room = self._rooms.get(name)
        if room is None or past.data_ptr() != room.data_ptr() or total > room.shape[-2]:
            rows, heads, _, size = new.shape
            room = new.new_empty(rows, heads, total + max(SPARE_AT_LEAST, int(SPARE_SHARE * total)), size)
            if length:
                room[:, :, :length] = past
            self._rooms[name] = room
        room[:, :, length:total] = new
        return room[:, :, :total]

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.get_seq_length() > 0:
            self.keys, self.values = self._moved("keys", self.keys, change), self._moved("values", self.values, change)

    def _moved(self, name: str, past: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The past with its rows changed, its spare room with it, so that the next token needs no second copy."""
        room = self._rooms[name]
        if past.data_ptr() != room.data_ptr():  # as after a crop from the left, or states that came from elsewhere
            room = past
        self._rooms[name] = change(room)
        return self._rooms[name][:, :, : past.shape[-2]]


@dataclass(frozen=True, slots=True)
class CachePart:
    """The cache of one model of a mixture. It holds B rows for each of `policies`, group after group."""

    cache: DynamicCache
    policies: tuple[int, ...]


class MixtureCache(Cache):  # type: ignore[misc]
    """A cache part for every model of a mixture that takes part; `layers` are all of theirs.

    Whatever `generate()` does to the B rows of a cache (reorder, repeat, select, crop) is done to each policy's rows.
    """

    def __init__(self, parts: Mapping[int, CachePart]) -> None:
        self.parts = dict(parts)
        super().__init__(layers=[layer for part in parts.values() for layer in part.cache.layers])

    @property
    def policies(self) -> set[int]:
        return {policy for part in self.parts.values() for policy in part.policies}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for part in self.parts.values():
            for layer in part.cache.layers:
                layer.reorder_cache(_in_every_group(beam_idx, layer, len(part.policies)))

    def batch_select_indices(self, indices: Tensor) -> None:
        for part in self.parts.values():
            for layer in part.cache.layers:
                layer.batch_select_indices(_in_every_group(indices, layer, len(part.policies)))


def _in_every_group(rows: Tensor, layer: DynamicLayer, num_groups: int) -> Tensor:
    """The places of rows 0 ≤ b < B in a layer that holds num_groups groups of B rows."""
    if layer.get_seq_length() == 0:
        return rows
    starts = torch.arange(num_groups, device=rows.device) * (layer.keys.shape[0] // num_groups)
    places: Tensor = (starts[:, None] + rows).flatten()
    return places
