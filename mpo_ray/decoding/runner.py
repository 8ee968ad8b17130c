"""One step of a mixture's policies: from the new tokens of many sequences to the distributions of their next ones.

A sequence has a *lane*: a row of KV-cache blocks for every policy with a weight. Nothing here knows of requests or of
drawing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpo_ray.decoding.branch import Branch, Piece, Predictions
from mpo_ray.decoding.need import Need, describe_pool, pool_tokens, too_large, too_many
from mpo_ray.maths.log_linear import log_normalizer
from mpo_ray.out_of_memory import memory_told
from mpo_ray.policies.kv_blocks import BLOCK_TOKENS, BlockPool, Promise, Row, blocks_for
from mpo_ray.policies.memory import GIB, gib, usual_kv_cache
from mpo_ray.policies.mixture import MixtureForCausalLM

#: What is there of a prompt: node and block, by policy.
Known = Mapping[int, Sequence[tuple[int, int]]]


@dataclass(slots=True)
class _Group:
    """The lanes of one request, and the blocks that it may still take of each branch, by the branch's place."""

    need: Need
    promises: dict[int, Promise]
    open_lanes: int = 0


@dataclass(slots=True)
class _Lane:
    """A sequence: its rows by policy, its computed tokens, and what is known of its blocks.

    nodes: by policy, of the last block whose content is known; num_known: such blocks; most_known: at most as many
    """

    group: _Group
    rows: dict[int, Row]
    tokens: list[int] = field(default_factory=list)
    nodes: dict[int, int] = field(default_factory=dict)
    num_known: int = 0
    most_known: int = 0


class MixtureRunner:
    """A mixture's models with their KV cache. The mixture's own `forward` stays what it was.

    max_num_seqs: sequences that are decoded at a time, at most
    context: tokens of a sequence, at most the model's own context
    kv_cache_gib: of all models together; a share of what is free if absent, and never more than can be needed
    """

    shares_prompts = True

    def __init__(
        self,
        mixture: MixtureForCausalLM,
        *,
        max_num_seqs: int,
        context: int | None = None,
        kv_cache_gib: float | None = None,
    ) -> None:
        """Raises NotInBlocksError for an architecture that gives something else when its cache lies in blocks."""
        self.num_policies = len(mixture.objectives)
        everyone = mixture.branches_of(range(self.num_policies))
        self._branches = {
            place: Branch(mixture.branches[place], mixture.objectives, policies) for place, policies in everyone.items()
        }
        self._place_of = {k: place for place, branch in self._branches.items() for k in branch.policies}
        self.has_reference = self.num_policies in self._place_of
        self.vocab_size = next(iter(self._branches.values())).vocab_size
        self.device = mixture.device
        self._lanes: dict[int, _Lane] = {}
        self._next_lane = 0
        self._longest = mixture.longest_texts()
        self.reserve(max_num_seqs=max_num_seqs, context=context, kv_cache_gib=kv_cache_gib)

    def reserve(
        self,
        *,
        max_num_seqs: int,
        context: int | None = None,
        kv_cache_gib: float | None = None,
        policies: Sequence[int] | None = None,
    ) -> None:
        self._max_num_seqs = max_num_seqs
        sharing = Counter(self._place_of[k] for k in (range(self.num_policies) if policies is None else policies))
        self.bytes_per_token = sum(self._branches[place].bytes_per_token * num for place, num in sharing.items())
        self._lanes.clear()  # of requests that an error left behind
        for branch in self._branches.values():
            branch.reserve(1)  # what there was counts as free
        num_bytes = usual_kv_cache(self.device) if kv_cache_gib is None else int(kv_cache_gib * GIB)
        self.num_tokens, self.context = pool_tokens(
            num_bytes, self.bytes_per_token, max_num_seqs, [*self._longest, context]
        )
        with memory_told(f"a KV cache of {gib(self.num_tokens * self.bytes_per_token)}", "Lower kv_cache_gib."):
            for place, num in sharing.items():
                self._branches[place].reserve(self.num_tokens // BLOCK_TOKENS * num)
        self.kv_blocks = sum(branch.pool.num_blocks for branch in self._branches.values())

    def __str__(self) -> str:
        return describe_pool(self.num_tokens, self.bytes_per_token, self.context)

    def kv_blocks_used(self) -> int:
        return sum(branch.pool.num_used for branch in self._branches.values())

    def refusal(self, need: Need) -> str | None:
        if need.num_seqs > self._max_num_seqs:
            return too_many(need.num_seqs, self._max_num_seqs)
        for place, wanted in self._wanted(need).items():
            if wanted > self._branches[place].pool.num_blocks:
                return too_large(need, wanted, self._branches[place].pool.num_blocks)
        return None

    def fits(self, need: Need) -> bool:
        if len(self._lanes) + need.num_seqs > self._max_num_seqs:
            return False
        return all(wanted <= self._branches[p].pool.num_available for p, wanted in self._wanted(need).items())

    def open(self, need: Need) -> tuple[list[int], int]:
        known = {k: self._known(need, k) for k in need.policies}
        num_known = min(len(found) for found in known.values())
        known = {k: found[:num_known] for k, found in known.items()}
        copies = bool(num_known) and not self._can_go_on(need, known)
        if copies and not self._room_beside(need, known, copies=True):
            copies = False
        if num_known and not copies and not self._room_beside(need, known, copies=False):
            num_known, known = 0, {k: [] for k in need.policies}
        taken = 0 if copies else num_known
        promises = {
            place: self._branches[place].pool.promise(wanted - taken * self._num_of(need, place))
            for place, wanted in self._wanted(need).items()
        }
        group = _Group(need, promises)
        lanes = [self._open(group) for _ in range(need.num_seqs)]
        first = self._lanes[lanes[0]]
        first.nodes = {k: found[-1][0] if found else 0 for k, found in known.items()}
        first.num_known = num_known
        first.most_known = blocks_for(need.num_tokens) if need.keeps else len(need.prompt) // BLOCK_TOKENS
        first.tokens = list(need.prompt[: num_known * BLOCK_TOKENS])
        if not copies:
            for k, found in known.items():
                self._pool(k).share(first.rows[k], [block for _, block in found])
        self._hold(need, lanes, taken)
        if copies:
            self._copy_known(first, known)
        return lanes, len(first.tokens)

    def close(self, lanes: Sequence[int], *, spoiled: bool = False) -> None:
        for number in lanes:
            lane = self._lanes.pop(number)
            for k, row in lane.rows.items():
                if spoiled:
                    self._clear(k, row)
                self._pool(k).close(row)
            lane.group.open_lanes -= 1
            if not lane.group.open_lanes:
                for place, promise in lane.group.promises.items():
                    self._branches[place].pool.forgo(promise)

    @torch.inference_mode()
    def copy(self, pairs: Sequence[tuple[int, int]], length: int) -> None:
        tokens = {target: self._lanes[source].tokens[:length] for source, target in pairs}
        moved: dict[int, list[tuple[int, int]]] = {place: [] for place in self._branches}
        for source, target in pairs:
            lane, shared = self._lanes[target], self._lanes[target].group.need.shared_blocks
            for k, row in lane.rows.items():
                given = self._lanes[source].rows[k]
                if not row.blocks:
                    self._pool(k).share(row, given.blocks[:shared])
                self._grow(lane, k, length)
                begin = shared * BLOCK_TOKENS
                moved[self._place_of[k]] += zip(given.places(begin, length), row.places(begin, length), strict=True)
        for place, found in moved.items():
            if found:
                self._branches[place].cache.copy(found)
        for target, held in tokens.items():
            self._lanes[target].tokens = held

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> Predictions:
        """Every policy of every piece, in one pass of each model."""
        for piece in pieces:
            self._prepare(piece)
        total = sum(piece.wanted for piece in pieces)
        separate = [piece.separate for piece in pieces for _ in range(piece.wanted)]
        policies: list[dict[int, Tensor]] = [{} for _ in separate]
        rows: Mapping[int, Mapping[int, Row]] = {piece.lane: self._lanes[piece.lane].rows for piece in pieces}
        logits: Tensor | None = None
        for branch in self._branches.values():
            part = branch.run(pieces, rows, total, separate, policies)
            if part is not None:
                logits = part if logits is None else logits + part
        for piece in pieces:
            self._remember(piece)
        if logits is None:
            logits = torch.zeros(total, self.vocab_size, device=self.device)
        log_z = torch.full((total,), torch.nan, dtype=torch.float64, device=logits.device)
        if all(separate):
            log_z = log_normalizer(logits).double()
        elif any(separate):
            chosen = torch.tensor(separate, device=logits.device)
            log_z[chosen] = log_normalizer(logits[chosen]).double()
        return Predictions(logits, log_z, policies)

    def _pool(self, policy: int) -> BlockPool:
        return self._branches[self._place_of[policy]].pool

    def _num_of(self, need: Need, place: int) -> int:
        return sum(self._place_of[k] == place for k in need.policies)

    def _wanted(self, need: Need) -> dict[int, int]:
        """Blocks of each branch that takes part."""
        counts = {place: self._num_of(need, place) for place in self._branches}
        return {place: need.blocks_per_policy * count for place, count in counts.items() if count}

    def _known(self, need: Need, policy: int) -> list[tuple[int, int]]:
        """Node and block of what is there of the prompt; its last token has to be computed."""
        return list(self._pool(policy).find(policy, need.prompt[:-1])) if need.reads_prompt else []

    def _can_go_on(self, need: Need, known: Known) -> bool:
        """Whether the rows can grow where their known blocks are, which lie one after the other."""
        for k, found in known.items():
            first, last, more = found[0][1], found[-1][1], blocks_for(need.num_tokens) - len(found)
            pool = self._pool(k)
            others = {block for other, blocks in known.items() if self._pool(other) is pool for _, block in blocks}
            room = pool.can_hold(last, more) and others.isdisjoint(range(last + 1, last + 1 + more))
            if last - first != len(found) - 1 or not room:
                return False
        return True

    def _room_beside(self, need: Need, known: Known, *, copies: bool) -> bool:
        """Whether the need fits beside known blocks, some of which only wait for their room to be taken."""
        for place, wanted in self._wanted(need).items():
            pool = self._branches[place].pool
            blocks = [block for k, found in known.items() if self._place_of[k] == place for _, block in found]
            if wanted - (0 if copies else len(blocks)) + pool.num_unused(blocks) > pool.num_available:
                return False
        return True

    @torch.inference_mode()
    def _copy_known(self, lane: _Lane, known: Known) -> None:
        """Copy known blocks to where the lane's rows are in one piece: rows in parts are read more slowly."""
        kept = {k: Row() for k in known}
        for k, found in known.items():
            self._pool(k).share(kept[k], [block for _, block in found])  # or their room might be taken for the copies
        for k, given in kept.items():
            pool, row = self._pool(k), lane.rows[k]
            self._grow(lane, k, len(lane.tokens))
            pairs = zip(given.places(0, len(lane.tokens)), row.places(0, len(lane.tokens)), strict=True)
            self._branches[self._place_of[k]].cache.copy(list(pairs))
            for block, copy in zip(given.blocks, row.blocks, strict=True):
                pool.replace(block, copy)
        for k, given in kept.items():
            self._pool(k).close(given)

    def _open(self, group: _Group) -> int:
        number, self._next_lane = self._next_lane, self._next_lane + 1
        self._lanes[number] = _Lane(group, {k: Row() for k in group.need.policies})
        group.open_lanes += 1
        return number

    def _hold(self, need: Need, lanes: Sequence[int], num_known: int) -> None:
        """Look for room where the rows of a request lie side by side: the first lane's, and then the others'."""
        own = blocks_for(need.num_tokens)
        for place in self._wanted(need):
            pool = self._branches[place].pool
            policies = [k for k in need.policies if self._place_of[k] == place]
            first = [self._lanes[lanes[0]].rows[k] for k in policies]
            if num_known:
                for row in first:
                    [row.held] = pool.hold(1, own - num_known, after=row.blocks[-1])  # elsewhere if it has to be
            else:
                for row, held in zip(first, pool.hold(len(first), own), strict=True):
                    row.held = held
            others = [self._lanes[lane].rows[k] for k in policies for lane in lanes[1:]]
            for row, held in zip(others, pool.hold(len(others), own - need.shared_blocks), strict=True):
                row.held = held

    def _grow(self, lane: _Lane, policy: int, num_tokens: int) -> None:
        self._pool(policy).grow(lane.rows[policy], num_tokens, lane.group.promises[self._place_of[policy]])

    def _prepare(self, piece: Piece) -> None:
        """Give the piece's rows their blocks, and forget what will be written over."""
        lane = self._lanes[piece.lane]
        end = piece.start + len(piece.tokens)
        for k, row in lane.rows.items():
            if len(row.blocks) * BLOCK_TOKENS < end:
                self._grow(lane, k, end)
        if piece.start < len(lane.tokens):
            del lane.tokens[piece.start :]
        if piece.start < lane.num_known * BLOCK_TOKENS:
            raise ValueError("a sequence would write over blocks that others may read")

    def _remember(self, piece: Piece) -> None:
        """Note what the blocks hold that are now full, for prompts to come."""
        lane = self._lanes[piece.lane]
        lane.tokens += piece.tokens
        while lane.num_known < min(len(lane.tokens) // BLOCK_TOKENS, lane.most_known):
            begin = lane.num_known * BLOCK_TOKENS
            tokens = lane.tokens[begin : begin + BLOCK_TOKENS]
            for k, row in lane.rows.items():
                block = row.blocks[lane.num_known]
                lane.nodes[k] = self._pool(k).remember(k, lane.nodes[k], tokens, block)
            lane.num_known += 1

    def _clear(self, policy: int, row: Row) -> None:
        branch = self._branches[self._place_of[policy]]
        own = [block for block in row.blocks if branch.pool.num_users(block) == 1]
        for block in own:
            branch.pool.forget(block)
        branch.cache.clear(own)
