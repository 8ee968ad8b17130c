"""A key-value cache of preallocated rows, and the attention that reads it: many sequences in one forward pass.

The pass takes the new tokens of all sequences end to end, as one row. Each token has a row of the cache and a position
in it; attention writes its key and value there and reads what that row holds up to the position. A row that is taken
again needs no clearing: what lies behind a position is never read before it is written.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "mpo_ray_slots"
#: Rows of single tokens are read in one piece if it holds at most this many times as many rows as are wanted.
MOST_SPAN = 1.5
#: Tokens: keys of so many in float32 are one line of the processor's cache.
_LINE = 16
#: Up to so many queries of a row and key head, two plain products are faster than torch's fused attention.
_FEW_QUERIES = 16


class Slots:
    """`num_rows` rows of `row_tokens` tokens for every layer of one model.

    A layer's room is made when the layer is first used, so that its sizes are the model's own. Keys lie transposed,
    which a product with one query reads in a row; their lines are an odd number of `_LINE`s, so that they do not fall
    into the same places of the processor's cache.
    """

    def __init__(self, num_rows: int, row_tokens: int) -> None:
        self.num_rows, self.row_tokens = num_rows, row_tokens
        self._free = list(range(num_rows))
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_bytes(self) -> int:
        return sum(room.nbytes for pair in self._layers.values() for room in pair)

    def take(self) -> int:
        """The lowest free row, so that rows in use lie close together."""
        return heapq.heappop(self._free)

    def give_back(self, row: int) -> None:
        heapq.heappush(self._free, row)

    def copy(self, pairs: Sequence[tuple[int, int]], length: int) -> None:
        """Let the second row of each pair hold the first `length` tokens of the first; a row may be both."""
        given, changed = (torch.tensor(rows) for rows in zip(*pairs, strict=True))
        for keys, values in self._layers.values():
            to, source = changed.to(keys.device), given.to(keys.device)
            keys[to, :, :, :length] = keys[source, :, :, :length]
            values[to, :, :length] = values[source, :, :length]

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (rows, heads, d, tokens) and values (rows, heads, tokens, d) of a layer. like: (1, heads, N, d)."""
        if index not in self._layers:
            _, heads, _, size = like.shape
            width = (-(-self.row_tokens // _LINE) | 1) * _LINE
            keys = like.new_zeros(self.num_rows, heads, size, width)  # 0 · nothing must not be NaN
            values = like.new_zeros(self.num_rows, heads, self.row_tokens, size)
            self._layers[index] = (keys, values)
        return self._layers[index]


@dataclass(frozen=True, slots=True)
class Segment:
    """Several tokens of a sequence, for G of its rows: `tokens` (G, T) are their places in the pass."""

    tokens: Tensor
    rows: Tensor
    start: int


@dataclass(slots=True)
class Layout:
    """Where each of the N tokens of a pass belongs.

    rows, positions: (N,) of the cache
    singles: (S,) the tokens that are the only new one of their row, or None for all of them
    lengths: tokens that each single's row holds, its own included
    """

    slots: Slots
    rows: Tensor
    positions: Tensor
    singles: Tensor | None
    lengths: Sequence[int]
    single_rows: Sequence[int]
    segments: Sequence[Segment]
    _masks: dict[Any, Any] = field(default_factory=dict)

    def span(self) -> tuple[int, int] | None:
        """The rows from … to that hold the singles, if few others lie between."""
        low, high = min(self.single_rows), max(self.single_rows) + 1
        return (low, high) if high - low <= MOST_SPAN * len(self.single_rows) else None

    def once(self, key: Any, make: Any) -> Any:
        """What `make` gives, made by the first layer that asks."""
        if key not in self._masks:
            self._masks[key] = make()
        return self._masks[key]


_LAYOUT: ContextVar[Layout | None] = ContextVar("slots_layout", default=None)


@contextmanager
def reading(model: Any, layout: Layout) -> Iterator[None]:
    """Passes of the model lie as `layout` says while the block runs; before and after it has its own attention."""
    config = model.config.get_text_config()
    own, config._attn_implementation = config._attn_implementation, NAME
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)
        config._attn_implementation = own


def _slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query: (1, heads, N, d); key, value: (1, key heads, N, d). Returns (1, N, heads, d)."""
    layout = _LAYOUT.get()
    if layout is None:
        raise RuntimeError(f"the attention {NAME} was called outside `reading`")
    keys, values = layout.slots.layer(module.layer_idx, key)
    keys[layout.rows, :, :, layout.positions] = key[0].transpose(0, 1)
    values[layout.rows, :, layout.positions] = value[0].transpose(0, 1)
    queries = query[0].transpose(0, 1)  # (N, heads, d)
    heads = key.shape[1]
    attend = _Attend(scaling, softcap)
    parts: list[tuple[Tensor | None, Tensor]] = []
    if layout.single_rows:
        chosen = queries if layout.singles is None else queries[layout.singles]
        parts.append((layout.singles, _attend_singles(layout, chosen, keys, values, sliding_window, attend)))
    for number, segment in enumerate(layout.segments):
        num, length = segment.tokens.shape
        end = segment.start + length
        mask = layout.once(
            (number, sliding_window),
            lambda s=segment, e=end, n=length: _causal(s.start, n, e, sliding_window, query),
        )
        grouped = queries[segment.tokens].view(num, length, heads, -1, queries.shape[-1]).permute(0, 2, 3, 1, 4)
        group = grouped.shape[2]
        rows = attend(
            grouped.reshape(num, heads, group * length, -1),
            keys[segment.rows, :, :, :end],
            values[segment.rows, :, :end],
            mask.repeat(group, 1),
        )
        flat = rows.view(num, heads, group, length, -1).permute(0, 3, 1, 2, 4).reshape(num * length, -1, rows.shape[-1])
        parts.append((segment.tokens.flatten(), flat))
    if len(parts) == 1 and parts[0][0] is None:
        return parts[0][1][None], None
    attended = torch.empty_like(queries)
    for tokens, found in parts:
        attended[tokens] = found
    return attended[None], None


def _attend_singles(
    layout: Layout, queries: Tensor, keys: Tensor, values: Tensor, window: int | None, attend: _Attend
) -> Tensor:
    """One token of each of S rows. queries: (S, heads, d). Returns (S, heads, d).

    The heads that share a key head are rows of one query, so that no key is repeated. Rows that lie close together are
    read where they are, with those between them; what the latter give is not used.
    """
    longest = max(layout.lengths)
    span = layout.once("span", layout.span)
    if span is None:
        rows = layout.once("rows", lambda: torch.tensor(layout.single_rows, device=queries.device))
        keys, values = keys[rows, :, :, :longest], values[rows, :, :longest]
        order = None
    else:
        low, high = span
        keys, values = keys[low:high, :, :, :longest], values[low:high, :, :longest]
        in_order = list(layout.single_rows) == list(range(low, high))
        order = (
            None
            if in_order
            else layout.once("order", lambda: torch.tensor(layout.single_rows, device=queries.device) - low)
        )
    if order is not None:
        queries = queries.new_zeros(keys.shape[0], *queries.shape[1:]).index_copy(0, order, queries)
    mask = layout.once(("singles", window), lambda: _row_mask(layout, order, keys.shape[0], longest, window, queries))
    grouped = queries.view(queries.shape[0], keys.shape[1], -1, queries.shape[-1])
    found = attend(grouped, keys, values, mask).reshape(queries.shape)
    return found if order is None else found[order]


def _row_mask(
    layout: Layout, order: Tensor | None, num_rows: int, longest: int, window: int | None, like: Tensor
) -> Tensor | None:
    """What each row may read, (rows, 1, 1, longest), added to the scores; None where all may read everything."""
    if order is None and min(layout.lengths) == longest and (window is None or longest <= window):
        return None
    lengths = torch.ones(num_rows, dtype=torch.long, device=like.device)  # rows in between read one token of their own
    given = torch.tensor(layout.lengths, device=like.device)
    lengths = given if order is None else lengths.index_copy(0, order, given)
    places = torch.arange(longest, device=like.device)
    allowed = places < lengths[:, None]
    if window is not None:
        allowed &= places >= lengths[:, None] - window
    return _additive(allowed, like)[:, None, None]


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

    queries (rows, heads, N, d), keys (rows, heads, d, T), values (rows, heads, T, d)
    """

    scaling: float | None
    softcap: float | None

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        if self.softcap is None and queries.shape[2] > _FEW_QUERIES:
            keys = keys.transpose(-1, -2).contiguous()
            return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self.scaling)
        scores = (queries @ keys).mul_(queries.shape[-1] ** -0.5 if self.scaling is None else self.scaling)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            scores += mask
        return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values


AttentionInterface.register(NAME, _slot_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
