"""The pool of KV-cache blocks, and attention over any arrangement of them against attention over plain tensors."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mpo_ray.policies.block_attention import BlockLayout, KVCache, _Attend, _Read
from mpo_ray.policies.block_reads import singles_of, stretch_of
from mpo_ray.policies.kv_blocks import BLOCK_TOKENS, BlockPool, Promise, Row

HEADS, GROUP, SIZE = 2, 3, 8
NUM_BLOCKS = 40


def row_of(blocks: list[int]) -> Row:
    row = Row()
    for block in blocks:
        row.append(block)
    return row


def test_blocks_are_promised_taken_and_given_back() -> None:
    pool = BlockPool(10)
    promise = pool.promise(6)
    row = Row()
    [row.held] = pool.hold(1, 6)
    pool.grow(row, 3 * BLOCK_TOKENS, promise)
    assert (pool.num_used, pool.num_promised, pool.num_available, promise.left) == (3, 3, 4, 3)
    with pytest.raises(ValueError, match="5 blocks are wanted and 4 are available"):
        pool.promise(5)
    pool.grow(row, 6 * BLOCK_TOKENS, promise)
    with pytest.raises(ValueError, match="more blocks than it was promised"):
        pool.grow(row, 6 * BLOCK_TOKENS + 1, promise)
    assert len(row.spans) == 1
    pool.close(row)
    pool.forgo(promise)
    assert (pool.num_used, pool.num_promised, pool.num_available) == (0, 0, 10)


def test_a_row_goes_elsewhere_where_its_place_is_taken_and_leaves_the_runs_of_others_alone() -> None:
    pool = BlockPool(8)
    one, other, third = Row(), Row(), Row()
    [one.held], [other.held] = pool.hold(1, 3), pool.hold(1, 3)
    pool.grow(third, 2 * BLOCK_TOKENS, Promise(2))
    assert third.blocks == [6, 7]
    pool.grow(one, 5 * BLOCK_TOKENS, Promise(5))  # more than it held: the rest is what is free, in the run of another
    assert one.blocks == [0, 1, 2, 3, 4]
    pool.grow(other, 1 * BLOCK_TOKENS, Promise(1))
    assert other.blocks == [5]


def test_equal_prefixes_are_found_by_policy_until_their_room_is_wanted() -> None:
    pool, tokens = BlockPool(4), list(range(3 * BLOCK_TOKENS))
    row = Row()
    pool.grow(row, len(tokens), pool.promise(3))
    node = 0
    for number, block in enumerate(row.blocks):
        node = pool.remember(0, node, tokens[number * BLOCK_TOKENS : (number + 1) * BLOCK_TOKENS], block)
    assert [block for _, block in pool.find(0, [*tokens, 5])] == row.blocks
    assert [block for _, block in pool.find(0, tokens[:-1])] == row.blocks[:2]
    assert not list(pool.find(1, tokens)), "another policy has other keys and values"
    assert not list(pool.find(0, [1, *tokens[1:]]))
    kept = list(row.blocks)
    pool.close(row)
    assert pool.num_available == 4
    again = Row()
    pool.share(again, kept[:1])
    assert (pool.num_used, pool.num_unused(kept)) == (1, 2)
    other = Row()
    pool.grow(other, 2 * BLOCK_TOKENS, pool.promise(2))
    assert other.blocks[0] == 3, "a block without a known content goes first"
    assert other.blocks[1] == kept[2], "of those with one, the end of a text goes before its beginning"
    assert [block for _, block in pool.find(0, tokens)] == kept[:2]


def test_random_lives_of_rows_never_take_a_block_twice_and_leave_nothing_behind() -> None:
    choose = random.Random(0)
    pool = BlockPool(NUM_BLOCKS)
    open_rows: list[tuple[Row, Promise, int]] = []
    for _ in range(3000):
        if open_rows and choose.random() < 0.45:
            row, promise, _ = open_rows.pop(choose.randrange(len(open_rows)))
            pool.close(row)
            pool.forgo(promise)
        elif (wanted := choose.randint(1, 9)) <= pool.num_available:
            row, promise = Row(), pool.promise(wanted)
            [row.held] = pool.hold(1, wanted)
            open_rows.append((row, promise, wanted))
        for row, promise, wanted in open_rows:
            pool.grow(row, choose.randint(0, wanted) * BLOCK_TOKENS, promise)
            if row.blocks and choose.random() < 0.1:
                pool.remember(0, 0, [choose.randint(0, 50)] * BLOCK_TOKENS, row.blocks[0])
        used = [block for row, _, _ in open_rows for block in row.blocks]
        assert len(used) == len(set(used)) == pool.num_used
        assert pool.num_available >= 0
    for row, promise, _ in open_rows:
        pool.close(row)
        pool.forgo(promise)
    assert (pool.num_used, pool.num_promised, pool.num_available) == (0, 0, NUM_BLOCKS)
    assert not pool._held.any()


def arrangements() -> dict[str, list[list[int]]]:
    shuffled = random.Random(1).sample(range(NUM_BLOCKS), 12)
    prefix = [4, 5, 6]
    return {
        "one": [[3, 4, 5]],
        "at equal distances": [[2, 3], [4, 5], [6, 7], [8, 9]],
        "at equal distances, a few missing": [[2, 3], [4, 5], [8, 9], [10, 11], [12, 13]],
        "in another order": [[8, 9], [2, 3], [4, 5]],
        "at two distances": [[0, 1], [2, 3], [7, 8, 9], [10, 11, 12], [13, 14, 15]],
        "at the end of the pool": [[0, 1, 2, 3, 4, 5], [33, 34], [39]],
        "scattered": [shuffled[:4], shuffled[4:7], shuffled[7:]],
        "one prefix": [[*prefix, 7, 8], [*prefix, 20], [*prefix, 22], [*prefix, 30, 24]],
        "one prefix of two policies": [[*prefix, 20], [*prefix, 22], [12, 13, 14, 24], [12, 13, 14, 26]],
        "a shorter and a longer prefix": [[*prefix, 20], [*prefix[:2], 22], [*prefix, 7, 24]],
        "straight, and in parts": [[0, 1, 2], [*prefix, 20], [10, 11], [*prefix, 30], [12, 13]],
    }


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", arrangements())
def test_attention_is_that_of_plain_tensors(name: str, softcap: float | None, window: int | None) -> None:
    """A single token of each row, and the last tokens of rows of one length, to 1e-5. What nobody reads is NaN-free."""
    generator = torch.Generator().manual_seed(0)
    rows = [row_of(blocks) for blocks in arrangements()[name]]
    choose = random.Random(2)
    lengths = [choose.randint((len(row.blocks) - 1) * BLOCK_TOKENS + 1, len(row.blocks) * BLOCK_TOKENS) for row in rows]
    keys, values = (torch.randn(NUM_BLOCKS * BLOCK_TOKENS, HEADS, SIZE, generator=generator) for _ in range(2))
    queries = torch.randn(len(rows), HEADS * GROUP, SIZE, generator=generator)
    singles = singles_of(rows, lengths, len(keys), torch.device("cpu"))
    layout = BlockLayout(KVCache(NUM_BLOCKS), torch.empty(0), singles, None, [])
    read = _Read(layout, keys, values, window, _Attend(0.5, softcap))
    found = read.singles(singles, queries)
    for row, length, query, answer in zip(rows, lengths, queries, found, strict=True):
        places = row.places(0, length)[-window if window else 0 :]
        expected = plain(query[:, None], keys[places], values[places], softcap)[:, 0]
        torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-4)
    short = min(lengths)
    stretch = stretch_of(rows, short, len(keys), torch.device("cpu"))
    for room in (keys, values):
        expected = torch.stack([room[row.places(0, short)] for row in rows])
        torch.testing.assert_close(stretch.of(room, short), expected, atol=0, rtol=0)


def plain(query: Tensor, keys: Tensor, values: Tensor, softcap: float | None) -> Tensor:
    """query: (heads, 1, d); keys, values: (T, key heads, d). Returns (heads, 1, d)."""
    keys, values = (room.transpose(0, 1).repeat_interleave(GROUP, 0) for room in (keys, values))
    if softcap is None:
        return scaled_dot_product_attention(query, keys, values, scale=0.5)
    scores = torch.tanh(query @ keys.transpose(1, 2) * 0.5 / softcap) * softcap
    return scores.softmax(-1) @ values
