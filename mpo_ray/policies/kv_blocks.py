"""Which KV-cache blocks of a pool are whose: counted, promised before they are taken, and shared by equal prefixes.

A block holds BLOCK_TOKENS tokens of one sequence under one policy, for every layer. A request is promised all blocks
that it can need when it is admitted, and takes them as it grows, so that nothing admitted can run out of memory. Blocks
that nobody uses any longer keep their tokens until their room is wanted: a prompt that begins with the same tokens
under the same policy goes on from them. Nothing here knows of tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

#: Tokens of a block.
BLOCK_TOKENS = 16

#: What a block holds: the policy, the node of the block before it (0 at the beginning), and its tokens.
Key = tuple[int, int, tuple[int, ...]]


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold as many tokens."""
    return -(-num_tokens // BLOCK_TOKENS)


@dataclass(slots=True)
class Promise:
    """Blocks that a request may still take."""

    left: int


@dataclass(slots=True)
class Row:
    """The blocks of one sequence under one policy, in the order of its tokens.

    spans: the same as runs of blocks that lie one after the other, [first block, number of blocks] each
    held: where the row would best grow, so that it stays one run
    """

    blocks: list[int] = field(default_factory=list)
    spans: list[list[int]] = field(default_factory=list)
    held: range = range(0)

    def append(self, block: int) -> None:
        if self.spans and block == sum(self.spans[-1]):
            self.spans[-1][1] += 1
        else:
            self.spans.append([block, 1])
        self.blocks.append(block)

    @property
    def straight_start(self) -> int | None:
        """The place of the first token where all tokens lie one after the other; None where they do not."""
        return self.spans[0][0] * BLOCK_TOKENS if len(self.spans) == 1 else None

    def places(self, start: int, end: int) -> list[int]:
        """Where the tokens at positions start … end − 1 are in the pool."""
        if len(self.spans) == 1:
            first = self.spans[0][0] * BLOCK_TOKENS
            return list(range(first + start, first + end))
        return [self.blocks[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS for at in range(start, end)]


class BlockPool:
    """`num_blocks` blocks. used: by sequences that are open; promised: of the others; the rest is available."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_used = self.num_promised = 0
        self._users = np.zeros(num_blocks, dtype=np.int32)
        self._held = np.zeros(num_blocks, dtype=bool)
        self._nodes: dict[Key, tuple[int, int]] = {}  # → node, block
        self._keys: dict[int, Key] = {}  # block → its key
        self._unused: OrderedDict[int, None] = OrderedDict()  # blocks with a key and no user, the oldest first
        self._last_node = 0

    @property
    def num_available(self) -> int:
        return self.num_blocks - self.num_used - self.num_promised

    def promise(self, num_blocks: int) -> Promise:
        """Raises ValueError for more than are available."""
        if num_blocks > self.num_available:
            raise ValueError(f"{num_blocks} blocks are wanted and {self.num_available} are available")
        self.num_promised += num_blocks
        return Promise(num_blocks)

    def forgo(self, promise: Promise) -> None:
        """Give back what was promised and not taken."""
        self.num_promised -= promise.left
        promise.left = 0

    def hold(self, num_rows: int, each: int, after: int | None = None) -> list[range]:
        """Runs of free blocks for rows of `each` blocks, side by side if there is such a place; empty ones if not.

        after: the block behind which to look first. Others take blocks of a run only where nothing else is free.
        """
        wanted = num_rows * each
        start = self._free_run(wanted, after) if wanted else None
        if start is None:
            return [range(0)] * num_rows
        self._held[start : start + wanted] = True
        return [range(start + i * each, start + (i + 1) * each) for i in range(num_rows)]

    def grow(self, row: Row, num_tokens: int, promise: Promise) -> None:
        """Take blocks until the row holds as many tokens."""
        while len(row.blocks) * BLOCK_TOKENS < num_tokens:
            row.append(self._take(row, promise))

    def can_hold(self, after: int, each: int) -> bool:
        """Whether as many blocks behind this one are free and in nobody's run."""
        run = slice(after + 1, after + 1 + each)
        return run.stop <= self.num_blocks and not self._users[run].any() and not self._held[run].any()

    def share(self, row: Row, blocks: Sequence[int]) -> None:
        """Let the row go on with blocks that hold what it needs already. They count as used, and not as promised."""
        for block in blocks:
            self._use(block)
            row.append(block)

    def close(self, row: Row) -> None:
        """Give up the row's blocks, the last first, so that the beginnings of texts are kept the longest."""
        self._held[row.held.start : row.held.stop] = False
        for block in reversed(row.blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self.num_used -= 1
                if block in self._keys:
                    self._unused[block] = None
        row.blocks, row.spans, row.held = [], [], range(0)

    def find(self, policy: int, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Blocks that hold the beginning of these tokens under this policy, as (node, block), until one is missing."""
        node = 0
        for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            found = self._nodes.get((policy, node, tuple(tokens[start : start + BLOCK_TOKENS])))
            if found is None:
                return
            node = found[0]
            yield found

    def num_users(self, block: int) -> int:
        return int(self._users[block])

    def num_unused(self, blocks: Sequence[int]) -> int:
        """How many of these blocks count as available as long as nobody shares them."""
        return sum(not self._users[block] for block in blocks)

    def remember(self, policy: int, node: int, tokens: Sequence[int], block: int) -> int:
        """Say what a full block holds; returns its node, which is that of an equal block if there is one.

        node: of the block before it, 0 if it is the first
        """
        key = (policy, node, tuple(tokens))
        found = self._nodes.get(key)
        if found is not None:
            return found[0]
        self.forget(block)
        self._last_node += 1
        self._nodes[key], self._keys[block] = (self._last_node, block), key
        return self._last_node

    def replace(self, block: int, copy: int) -> None:
        """What the block is known to hold is from now on to be found in a copy of it."""
        key = self._keys.pop(block)
        self._unused.pop(block, None)
        self._nodes[key], self._keys[copy] = (self._nodes[key][0], copy), key

    def forget(self, block: int) -> None:
        """The block's content is no longer what it was."""
        key = self._keys.pop(block, None)
        if key is not None:
            del self._nodes[key]
            self._unused.pop(block, None)

    def _take(self, row: Row, promise: Promise) -> int:
        if not promise.left:
            raise ValueError("a sequence wants more blocks than it was promised")
        grown = bool(row.blocks) and row.blocks[-1] in row.held
        following = row.blocks[-1] + 1 if grown else row.held.start
        block = following if following in row.held and not self._users[following] else self._any_free()
        self.forget(block)
        self._use(block)
        promise.left -= 1
        self.num_promised -= 1
        return block

    def _use(self, block: int) -> None:
        if not self._users[block]:
            self.num_used += 1
            self._unused.pop(block, None)
        self._users[block] += 1

    def _any_free(self) -> int:
        """A free block: without a known content if there is one, and in nobody's run if there is one."""
        free = self._users == 0
        known = np.fromiter(self._unused, dtype=np.int64, count=len(self._unused))
        blank = free.copy()
        blank[known] = False
        for choice in (blank & ~self._held, blank):
            if choice.any():
                return int(choice.argmax())
        return next(iter(self._unused))

    def _free_run(self, length: int, after: int | None) -> int | None:
        """Where as many free blocks lie one after the other, first among those without a known content."""
        if after is not None and self.can_hold(after, length):
            return after + 1
        free = (self._users == 0) & ~self._held
        known = np.fromiter(self._unused, dtype=np.int64, count=len(self._unused))
        blank = free.copy()
        blank[known] = False
        for choice in (blank, free):
            taken = np.concatenate([[-1], np.flatnonzero(~choice), [self.num_blocks]])
            fitting = np.flatnonzero(np.diff(taken) > length)
            if len(fitting):
                return int(taken[fitting[0]]) + 1
        return None
