"""Keys and values in KV-cache blocks, and the attention that reads them: many sequences in one forward pass.

The pass takes the new tokens of all sequences end to end, as one row. Attention writes each key and value to its place
in the pool, and reads what the row holds up to the token's position. Rows whose blocks lie one after the other, at
equal distances, are read where they are, in one piece. A prefix that several rows share is read once for all of them:
the parts of a row are attended to apart, and put together by their softmax sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mpo_ray.policies.block_reads import Part, Singles, Stretch
from mpo_ray.policies.kv_blocks import BLOCK_TOKENS

#: Alignment of a pool's memory, bytes.
ALIGNED = 64
#: Rows of a part that are multiplied one by one: more are copied, which takes less time than as many calls.
FEW_ROWS = 4
#: In the place of the largest score where nothing may be read.
NOTHING = -1e30


class KVCache:
    """Room for the keys and values of `num_blocks` blocks, for every layer of one model.

    like: another cache of the model, whose layers this one has at once; else a layer's room is made when it is first
        used, so that its sizes are the model's own. On a CPU it costs memory only where something was written.
    """

    def __init__(self, num_blocks: int, like: KVCache | None = None) -> None:
        self.num_tokens = num_blocks * BLOCK_TOKENS
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        for index, rooms in ({} if like is None else like._layers).items():
            keys, values = (_zeros((self.num_tokens, *room.shape[1:]), room) for room in rooms)
            self._layers[index] = (keys, values)

    @property
    def bytes_per_token(self) -> int:
        """Of all layers that were used."""
        return sum(room.nbytes for pair in self._layers.values() for room in pair) // self.num_tokens

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Let the second place of each pair hold what the first does; a place may be both."""
        given, changed = (torch.tensor(places) for places in zip(*pairs, strict=True))
        for room in (room for pair in self._layers.values() for room in pair):
            room.index_copy_(0, changed.to(room.device), room.index_select(0, given.to(room.device)))

    def clear(self, blocks: Sequence[int]) -> None:
        """Write zeros: 0 · NaN is NaN, so that what is masked would spoil whoever takes the block next."""
        for room in (room for pair in self._layers.values() for room in pair):
            for block in blocks:
                room[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS] = 0

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (tokens, heads, d) each. key, value: (1, heads, N, d), new ones."""
        if index not in self._layers:
            keys, values = (_zeros((self.num_tokens, new.shape[1], new.shape[3]), new) for new in (key, value))
            self._layers[index] = (keys, values)  # zeros, since 0 · nothing must not be NaN
        return self._layers[index]


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros that an operating system hands out when they are first touched, where there is one."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    size = int(np.prod(shape)) * like.element_size()
    memory = np.zeros(size + ALIGNED, dtype=np.uint8)
    offset = -memory.ctypes.data % ALIGNED
    return torch.from_numpy(memory[offset : offset + size]).view(like.dtype).view(shape)


@dataclass(frozen=True, slots=True)
class Segment:
    """Several tokens of a sequence, for G of its rows: `tokens` (G, T) are their places in the pass."""

    tokens: Tensor
    rows: Stretch
    start: int


@dataclass(slots=True)
class BlockLayout:
    """Where each of the N tokens of a pass belongs.

    places: (N,) in the pool
    singles: the tokens that are the only new one of their row; single_tokens: (S,) which they are, None for all
    """

    cache: KVCache
    places: Tensor
    singles: Singles | None
    single_tokens: Tensor | None
    segments: Sequence[Segment]
    _masks: dict[Any, Tensor | None] = field(default_factory=dict)

    def mask(self, key: Any, make: Callable[[], Tensor | None]) -> Tensor | None:
        """What `make` gives, made by the first layer that asks."""
        if key not in self._masks:
            self._masks[key] = make()
        return self._masks[key]

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        **how: Any,
    ) -> Tensor:
        """As `ragged_attention.Layout.attend`: write keys and values to their places, and read what the rows hold."""
        keys, values = self.cache.layer(module.layer_idx, key, value)
        for room, new in ((keys, key), (values, value)):
            room.index_copy_(0, self.places, new[0].transpose(0, 1))
        queries = query[0].transpose(0, 1)  # (N, heads, d)
        read = _Read(self, keys, values, sliding_window, _Attend(scaling, softcap))
        found: list[tuple[Tensor | None, Tensor]] = []
        if self.singles is not None:
            chosen = queries if self.single_tokens is None else queries[self.single_tokens]
            found.append((self.single_tokens, read.singles(self.singles, chosen)))
        for number, segment in enumerate(self.segments):
            found.append((segment.tokens.flatten(), read.segment(number, segment, queries)))
        return _in_order(found, queries, values.shape[-1])[None]


def _in_order(found: Sequence[tuple[Tensor | None, Tensor]], queries: Tensor, size: int) -> Tensor:
    """(N, heads, size) from answers to some of N queries each; None for all of them."""
    if len(found) == 1 and found[0][0] is None:
        return found[0][1]
    attended = queries.new_empty(*queries.shape[:-1], size)
    for tokens, answers in found:
        attended[tokens] = answers
    return attended


@dataclass(frozen=True, slots=True)
class _Read:
    """What a layer reads in a pass. keys, values: (tokens of the pool, key heads, d and d_v)"""

    layout: BlockLayout
    keys: Tensor
    values: Tensor
    window: int | None
    attend: _Attend

    def singles(self, singles: Singles, queries: Tensor) -> Tensor:
        """One token of each of S rows. queries: (S, heads, d). Returns (S, heads, d_v)."""
        found = [(one.tokens, self._rows(number, one, queries)) for number, one in enumerate(singles.straight)]
        if singles.parts:
            found.append((singles.in_parts, self._parts(singles, queries)))
        return _in_order(found, queries, self.values.shape[-1])

    def segment(self, number: int, segment: Segment, queries: Tensor) -> Tensor:
        """Several tokens of rows that are equally long. Returns (G · T, heads, d_v)."""
        num, length = segment.tokens.shape
        end, heads = segment.start + length, self.keys.shape[1]
        make = partial(_causal, segment.start, length, end, self.window, queries)
        mask = self.layout.mask((number, self.window), make)
        assert mask is not None
        grouped = queries[segment.tokens].view(num, length, heads, -1, queries.shape[-1]).permute(0, 2, 3, 1, 4)
        group = grouped.shape[2]
        rows = self.attend(
            grouped.reshape(num, heads, group * length, -1),
            segment.rows.of(self.keys, end).transpose(1, 2),
            segment.rows.of(self.values, end).transpose(1, 2),
            mask.repeat(group, 1),
        )
        size = rows.shape[-1]
        return rows.view(num, heads, group, length, size).permute(0, 3, 1, 2, 4).reshape(num * length, -1, size)

    def _rows(self, number: int, rows: Any, queries: Tensor) -> Tensor:
        """Single tokens of rows that are each in one piece. Heads that share a key head are rows of one query."""
        keys, values = (rows.read.of(room, rows.longest).transpose(1, 2) for room in (self.keys, self.values))
        mask = self.layout.mask(("rows", number, self.window), lambda: _row_mask(rows, self.window, queries))
        asked = queries if rows.given is None else queries.index_select(0, rows.given)
        found = self.attend(asked.reshape(asked.shape[0], keys.shape[1], -1, asked.shape[-1]), keys, values, mask)
        answers = found.reshape(*asked.shape[:2], values.shape[-1])
        return answers if rows.taken is None else answers.index_select(0, rows.taken)

    def _parts(self, singles: Singles, queries: Tensor) -> Tensor:
        """Single tokens of rows in several pieces, put together: Σ e^(m_p − m) o_p / Σ e^(m_p − m) s_p."""
        shape = (len(queries), queries.shape[1])
        largest = torch.full(shape, NOTHING, device=queries.device)
        total = torch.zeros(shape, device=queries.device)
        answers = torch.zeros(*shape, self.values.shape[-1], device=queries.device)
        for number, part in enumerate(singles.parts):
            mask = self.layout.mask(("part", number, self.window), partial(_part_mask, part, self.window, queries))
            most, sums, found = self._part(part, queries, mask)
            tokens = part.asked.flatten()
            before = largest[tokens]
            largest[tokens] = now = torch.maximum(before, most)
            old, new = (before - now).exp(), (most - now).exp()
            total[tokens] = total[tokens] * old + sums * new
            answers[tokens] = answers[tokens] * old[..., None] + found * new[..., None]
        assert singles.in_parts is not None
        return (answers / total[..., None])[singles.in_parts].to(queries.dtype)

    def _part(self, part: Part, queries: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Largest score m and Σ e^(s − m), (R · n, heads), and Σ e^(s − m) v, (R · n, heads, d_v), in float32."""
        num, each = part.asked.shape
        keys, values = (part.read.of(room, part.longest).transpose(1, 2) for room in (self.keys, self.values))
        heads = keys.shape[1]
        asked = queries[part.asked].view(num, each, heads, -1, queries.shape[-1]).permute(0, 2, 1, 3, 4)
        scores = _products(asked.reshape(num, heads, -1, queries.shape[-1]), keys.transpose(-1, -2))
        scores = self.attend.scores(scores, queries.shape[-1]).view(num, heads, each, -1, part.longest)
        if mask is not None:
            scores = scores + mask[:, None, :, None]
        most = scores.amax(-1).clamp_min(NOTHING)
        shares = (scores - most[..., None]).exp()
        found = _products(shares.flatten(2, 3).to(values.dtype), values).view(*most.shape, -1).float()
        most, sums = (each.permute(0, 2, 1, 3).flatten(2).flatten(0, 1) for each in (most, shares.sum(-1)))
        return most, sums, found.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """left @ right for (R, heads, ·, ·); a few rows one by one, so that what lies apart in memory is not copied."""
    if len(left) > FEW_ROWS:
        return left @ right
    return torch.stack([one @ other for one, other in zip(left, right, strict=True)])


def _row_mask(rows: Any, window: int | None, like: Tensor) -> Tensor | None:
    """What each row may read, (rows, 1, 1, longest), added to the scores; None where all may read everything."""
    if rows.shortest == rows.longest and (window is None or rows.longest <= window):
        return None
    places = torch.arange(rows.longest, device=like.device)
    allowed = places < rows.lengths[:, None]
    if window is not None:
        allowed &= places >= rows.lengths[:, None] - window
    return _additive(allowed, like)[:, None, None]


def _part_mask(part: Part, window: int | None, like: Tensor) -> Tensor | None:
    """What each query may read of its part, (R, n, longest), added to the scores; None for everything."""
    first = 0 if window is None else part.last_position + 1 - window
    if part.shortest == part.longest and first <= part.offset:
        return None
    places = torch.arange(part.longest, device=like.device)
    allowed = places < part.lengths[..., None]
    if window is not None:
        allowed &= places + part.offset > part.positions[..., None] - window
    return _additive(allowed, like).float()


def _causal(start: int, length: int, end: int, window: int | None, like: Tensor) -> Tensor:
    """What tokens at start … end − 1 may read of their row, (length, end), added to the scores."""
    positions = torch.arange(start, end, device=like.device)[:, None]
    places = torch.arange(end, device=like.device)
    allowed = places <= positions
    if window is not None:
        allowed &= places > positions - window
    return _additive(allowed, like)


def _additive(allowed: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(~allowed, float("-inf"))


@dataclass(frozen=True, slots=True)
class _Attend:
    """softmax(cap(Q K · scaling) + mask) V, where cap(s) = softcap · tanh(s / softcap).

    queries (rows, heads, N, d); keys (rows, heads, T, d); values (rows, heads, T, d_v)
    """

    scaling: float | None
    softcap: float | None

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        if self.softcap is None:
            return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self.scaling)
        scores = self.scores(queries @ keys.transpose(-1, -2), queries.shape[-1])
        if mask is not None:
            scores += mask
        return scores.softmax(-1).to(values.dtype) @ values

    def scores(self, products: Tensor, size: int) -> Tensor:
        """cap(Q K · scaling) in float32. size: d"""
        scores = products.float() * (size**-0.5 if self.scaling is None else self.scaling)
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap
