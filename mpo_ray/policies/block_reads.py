"""How the rows of a pass are read from a pool of KV-cache blocks: in as few pieces as they lie in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mpo_ray.policies.kv_blocks import BLOCK_TOKENS, Row

#: Rows at equal distances are read in one piece if it holds at most this many times as many rows as are wanted.
MOST_SPAN = 1.5


@dataclass(frozen=True, slots=True)
class Stretch:
    """R rows of tokens in a pool: at equal distances from `start` on, or at `places` (R, T)."""

    start: int = 0
    distance: int = 0
    num_rows: int = 1
    places: Tensor | None = None

    def of(self, room: Tensor, length: int) -> Tensor:
        """The first tokens of each row, (R, length, heads, d). room: (tokens, heads, d)"""
        if self.places is not None:
            return room[self.places[:, :length]]
        _, heads, size = room.shape
        token = heads * size
        return room.as_strided(
            (self.num_rows, length, heads, size),
            (self.distance * token, token, size, 1),
            room.storage_offset() + self.start * token,
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """Single new tokens of rows that are each in one piece: R rows are read, up to the longest.

    tokens: (S,) the tokens, None for all that are single
    given: (R,) the token whose query each row is asked, or any where it is no single's; taken: (S,) where in the
    answers each token's is. None for both where tokens and rows lie in one order.
    lengths: (R,) tokens that each row holds
    """

    tokens: Tensor | None
    read: Stretch
    given: Tensor | None
    taken: Tensor | None
    lengths: Tensor
    shortest: int
    longest: int


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of R rows that n single tokens each read. asked: (R, n) the tokens; lengths: (R, n) what they may read.

    offset: the position of the piece's first token; positions: (R, n) those of the tokens
    """

    read: Stretch
    asked: Tensor
    lengths: Tensor
    positions: Tensor
    offset: int
    shortest: int
    longest: int
    last_position: int


@dataclass(frozen=True, slots=True)
class Singles:
    """Single new tokens of S rows. in_parts: which of them are in several parts, None for none"""

    straight: Sequence[Rows]
    parts: Sequence[Part]
    in_parts: Tensor | None


def singles_of(rows: Sequence[Row], lengths: Sequence[int], num_tokens: int, device: torch.device) -> Singles:
    """How to read for a single new token in each of these rows, which hold as many tokens with it.

    num_tokens: of the pool
    """
    starts = [row.straight_start for row in rows]
    straight = sorted((start, n) for n, start in enumerate(starts) if start is not None)
    apart = [n for n, start in enumerate(starts) if start is None]
    groups = [
        _rows([straight[i] for i in group], lengths, len(rows), device)
        for group in _at_equal_distances([(start, lengths[n]) for start, n in straight], num_tokens)
    ]
    parts = _parts([(n, rows[n], lengths[n]) for n in apart], num_tokens, device)
    return Singles(groups, parts, torch.tensor(apart, device=device) if apart else None)


def stretch_of(rows: Sequence[Row], length: int, num_tokens: int, device: torch.device) -> Stretch:
    """How to read the first `length` tokens of these rows, in their order."""
    starts = [row.straight_start for row in rows]
    if all(start is not None for start in starts):
        known = [start for start in starts if start is not None]
        distances = {b - a for a, b in pairwise(known)}
        if len(distances) <= 1 and min(distances, default=1) > 0 and known[-1] + length <= num_tokens:
            return Stretch(known[0], max(distances, default=0), len(known))
    return Stretch(places=torch.tensor([row.places(0, length) for row in rows], device=device))


def _rows(group: Sequence[tuple[int, int]], lengths: Sequence[int], num_all: int, device: torch.device) -> Rows:
    """group: start and number of each token's row, at multiples of one distance"""
    low, high = group[0][0], group[-1][0]
    distance = min((b[0] - a[0] for a, b in pairwise(group)), default=0)
    count = (high - low) // distance + 1 if distance else 1
    given, held = [group[0][1]] * count, [1] * count  # rows in between read one token of their own
    places = [(start - low) // distance if distance else 0 for start, _ in group]
    for place, (_, n) in zip(places, group, strict=True):
        given[place], held[place] = n, lengths[n]
    numbers = [n for _, n in group]
    everyone = len(group) == num_all and numbers == sorted(numbers)
    in_order = everyone and count == num_all
    return Rows(
        None if len(group) == num_all else torch.tensor(numbers, device=device),
        Stretch(low, distance, count),
        None if in_order else torch.tensor(given, device=device),
        None if in_order else torch.tensor(_taken(group, places, num_all), device=device),
        torch.tensor(held, device=device),
        min(held),
        max(held),
    )


def _taken(group: Sequence[tuple[int, int]], places: Sequence[int], num_all: int) -> list[int]:
    """Where the answers are: in the order of the tokens if they are all, else in the order of the group."""
    if len(group) < num_all:
        return list(places)
    return [place for _, place in sorted(zip((n for _, n in group), places, strict=True))]


def _at_equal_distances(rows: Sequence[tuple[int, int]], num_tokens: int) -> list[list[int]]:
    """Groups of rows, by number, that can be read in one piece. rows: start and length, by start."""
    starts = [start for start, _ in rows]
    if len(rows) > 1:
        distance = min(b - a for a, b in pairwise(starts))
        far = starts[-1] - starts[0]
        together = distance and far // distance + 1 <= MOST_SPAN * len(rows)
        if together and all((start - starts[0]) % distance == 0 for start in starts):
            return _within([list(range(len(rows)))], rows, num_tokens)
    groups: list[list[int]] = []
    for number, start in enumerate(starts):
        group = groups[-1] if groups else []
        fits = len(group) == 1 or (len(group) > 1 and start - starts[number - 1] == starts[group[1]] - starts[group[0]])
        if fits:
            group.append(number)
        else:
            groups.append([number])
    return _within(groups, rows, num_tokens)


def _within(groups: list[list[int]], rows: Sequence[tuple[int, int]], num_tokens: int) -> list[list[int]]:
    """The same, without those whose last rows would be read beyond the pool's end: these are by themselves."""
    found = []
    for group in groups:
        rest = list(group)
        while len(rest) > 1 and rows[rest[-1]][0] + max(rows[n][1] for n in rest) > num_tokens:
            found.append([rest.pop()])
        found.append(rest)
    return found


def _parts(rows: Sequence[tuple[int, Row, int]], num_tokens: int, device: torch.device) -> list[Part]:
    """rows: number of the token, its row, and how many tokens the row holds with it"""
    pieces: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}  # offset, start, size → who reads it
    for number, row, length in rows:
        offset = 0
        for block, num_blocks in row.spans:
            readable = min(num_blocks * BLOCK_TOKENS, length - offset)
            if readable <= 0:
                break
            size = num_blocks * BLOCK_TOKENS
            pieces.setdefault((offset, block * BLOCK_TOKENS, size), []).append((number, readable, length - 1))
            offset += size
    alike: dict[tuple[int, int], list[tuple[int, list[tuple[int, int, int]]]]] = {}
    for (offset, start, _), readers in pieces.items():
        alike.setdefault((offset, len(readers)), []).append((start, readers))
    parts = []
    for (offset, _), found in alike.items():
        found.sort(key=lambda piece: piece[0])
        spans = [(start, max(readable for _, readable, _ in readers)) for start, readers in found]
        for group in _at_equal_distances(spans, num_tokens):
            parts += [_part(offset, [found[n] for n in some], device) for some in _without_gaps(group, spans)]
    return parts


def _without_gaps(group: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The group cut where the distance is not that of its first two."""
    cut: list[list[int]] = []
    for n in group:
        last = cut[-1] if cut else []
        if len(last) > 1 and spans[n][0] - spans[last[-1]][0] != spans[last[1]][0] - spans[last[0]][0]:
            last = []
        if last:
            last.append(n)
        else:
            cut.append([n])
    return cut


def _part(offset: int, pieces: Sequence[tuple[int, list[tuple[int, int, int]]]], device: torch.device) -> Part:
    """pieces: where each begins, and who reads it: the token's number, what it may read, its position"""
    starts = [start for start, _ in pieces]
    numbers, readable, positions = (
        [[reader[field] for reader in readers] for _, readers in pieces] for field in range(3)
    )
    flat = [length for row in readable for length in row]
    return Part(
        Stretch(starts[0], starts[1] - starts[0] if len(starts) > 1 else 0, len(starts)),
        torch.tensor(numbers, device=device),
        torch.tensor(readable, device=device),
        torch.tensor(positions, device=device),
        offset,
        min(flat),
        max(flat),
        max(position for row in positions for position in row),
    )
