"""A key-value cache of preallocated rows, and the attention that reads it: many sequences in one forward pass.

The pass takes the new tokens of all sequences end to end, as one row. Each token has a row of the cache and a position
in it; attention writes its key and value there and reads what that row holds up to the position. A row that is taken
again needs no clearing: what lies behind a position is never read before it is written.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "mpo_ray_slots"
#: Rows of single tokens are read in one piece if it holds at most this many times as many rows as are wanted.
MOST_SPAN = 1.5


class Slots:
    """`num_rows` rows of `row_tokens` tokens for every layer of one model.

    A layer's room is made when the layer is first used, so that its sizes are the model's own. What a token adds to a
    row lies together, all heads of it.
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
        for room in (room for pair in self._layers.values() for room in pair):
            room[changed.to(room.device), :length] = room[given.to(room.device), :length]

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (rows, tokens, heads, d) each. key, value: (1, heads, N, d), new ones."""
        if index not in self._layers:
            keys, values = (
                new.new_zeros(self.num_rows, self.row_tokens, new.shape[1], new.shape[3]) for new in (key, value)
            )
            self._layers[index] = (keys, values)  # zeros, since 0 · nothing must not be NaN
        return self._layers[index]


@dataclass(frozen=True, slots=True)
class Segment:
    """Several tokens of a sequence, for G of its rows: `tokens` (G, T) are their places in the pass."""

    tokens: Tensor
    rows: Tensor
    start: int


@dataclass(frozen=True, slots=True)
class Singles:
    """Single new tokens of S rows, and how the cache is read for them: R rows of it, up to the longest.

    read: these rows, in the order of the cache
    given: (R,) the token whose query each of them is asked, or any where it is no single's; taken: (S,) where in the
    answers each token's is. None for both where tokens and rows lie in one order.
    lengths: (R,) tokens that each row holds
    """

    read: slice | Tensor
    given: Tensor | None
    taken: Tensor | None
    lengths: Tensor
    shortest: int
    longest: int


def singles_of(rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> Singles:
    """Single new tokens in these rows, which hold as many tokens with them.

    Rows that lie close together are read where they are, with those between them; others are copied first.
    """
    low, high = min(rows), max(rows) + 1
    if high - low > MOST_SPAN * len(rows):
        read: slice | Tensor = torch.tensor(rows, device=device)
        return Singles(read, None, None, torch.tensor(lengths, device=device), min(lengths), max(lengths))
    given, held = [0] * (high - low), [1] * (high - low)  # rows in between read one token of their own
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        given[row - low], held[row - low] = number, length
    in_order = len(given) == len(rows) and given == sorted(given)
    return Singles(
        slice(low, high),
        None if in_order else torch.tensor(given, device=device),
        None if in_order else torch.tensor([row - low for row in rows], device=device),
        torch.tensor(held, device=device),
        min(held),
        max(held),
    )


@dataclass(slots=True)
class Layout:
    """Where each of the N tokens of a pass belongs.

    places: (N,) of the cache: row · row_tokens + position
    singles: the tokens that are the only new one of their row; single_tokens: (S,) which they are, None for all
    """

    slots: Slots
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
    """query, key: (1, heads or key heads, N, d); value: (1, key heads, N, d_v). Returns (1, N, heads, d_v)."""
    layout = _LAYOUT.get()
    if layout is None:
        raise RuntimeError(f"the attention {NAME} was called outside `reading`")
    keys, values = layout.slots.layer(module.layer_idx, key, value)
    for room, new in ((keys, key), (values, value)):
        room.flatten(0, 1).index_copy_(0, layout.places, new[0].transpose(0, 1))
    queries = query[0].transpose(0, 1)  # (N, heads, d)
    attend = _Attend(scaling, softcap)
    parts: list[tuple[Tensor | None, Tensor]] = []
    if layout.singles is not None:
        chosen = queries if layout.single_tokens is None else queries[layout.single_tokens]
        parts.append(
            (
                layout.single_tokens,
                _attend_singles(layout, layout.singles, chosen, keys, values, sliding_window, attend),
            )
        )
    for number, segment in enumerate(layout.segments):
        num, length = segment.tokens.shape
        end = segment.start + length
        mask = layout.mask(
            (number, sliding_window), partial(_causal, segment.start, length, end, sliding_window, query)
        )
        assert mask is not None
        heads = key.shape[1]
        grouped = queries[segment.tokens].view(num, length, heads, -1, queries.shape[-1]).permute(0, 2, 3, 1, 4)
        group = grouped.shape[2]
        rows = attend(
            grouped.reshape(num, heads, group * length, -1),
            keys[segment.rows, :end].transpose(1, 2),
            values[segment.rows, :end].transpose(1, 2),
            mask.repeat(group, 1),
        )
        flat = rows.view(num, heads, group, length, -1).permute(0, 3, 1, 2, 4).reshape(num * length, -1, rows.shape[-1])
        parts.append((segment.tokens.flatten(), flat))
    if len(parts) == 1 and parts[0][0] is None:
        return parts[0][1][None], None
    attended = queries.new_empty(*queries.shape[:-1], values.shape[-1])
    for tokens, found in parts:
        attended[tokens] = found
    return attended[None], None


def _attend_singles(
    layout: Layout,
    singles: Singles,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int | None,
    attend: _Attend,
) -> Tensor:
    """One token of each of S rows. queries: (S, heads, d). Returns (S, heads, d_v).

    The heads that share a key head are rows of one query, so that no key is repeated.
    """
    keys, values = (room[singles.read, : singles.longest].transpose(1, 2) for room in (keys, values))
    mask = layout.mask(("singles", window), lambda: _row_mask(singles, window, queries))
    asked = queries if singles.given is None else queries.index_select(0, singles.given)
    found = attend(asked.reshape(asked.shape[0], keys.shape[1], -1, asked.shape[-1]), keys, values, mask)
    answers = found.reshape(*asked.shape[:2], values.shape[-1])
    return answers if singles.taken is None else answers.index_select(0, singles.taken)


def _row_mask(singles: Singles, window: int | None, like: Tensor) -> Tensor | None:
    """What each row may read, (rows, 1, 1, longest), added to the scores; None where all may read everything."""
    if singles.shortest == singles.longest and (window is None or singles.longest <= window):
        return None
    places = torch.arange(singles.longest, device=like.device)
    allowed = places < singles.lengths[:, None]
    if window is not None:
        allowed &= places >= singles.lengths[:, None] - window
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

    queries (rows, heads, N, d); keys (rows, heads, T, d); values (rows, heads, T, d_v)
    """

    scaling: float | None
    softcap: float | None

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        if self.softcap is None:
            return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self.scaling)
        scores = (queries @ keys.transpose(-1, -2)).mul_(
            queries.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        )
        scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            scores += mask
        return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values


AttentionInterface.register(NAME, _slot_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
