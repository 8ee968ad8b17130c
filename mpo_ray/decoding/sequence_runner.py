"""A step of policies whose cache cannot lie in blocks: one sequence of one policy after the other, in its own cache.

Slower than `MixtureRunner`, and right for every family: nothing is batched, nothing is padded. Memory is counted in
blocks of as many tokens as elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpo_ray.decoding.branch import Piece, Predictions
from mpo_ray.decoding.need import Need, describe_pool, pool_tokens, too_large, too_many
from mpo_ray.maths.log_linear import log_normalizer
from mpo_ray.policies.kv_blocks import BLOCK_TOKENS, blocks_for
from mpo_ray.policies.memory import GIB, usual_kv_cache
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.policies.own_cache import OwnCache


@dataclass(frozen=True, slots=True)
class _Lane:
    """The caches of a sequence by policy. num_blocks: that its request counts, written to its first lane"""

    caches: dict[int, OwnCache]
    num_blocks: int


class SequenceRunner:
    """A `Runner` on the models' own caches. Arguments as of `MixtureRunner`."""

    shares_prompts = False

    def __init__(
        self,
        mixture: MixtureForCausalLM,
        *,
        max_num_seqs: int,
        context: int | None = None,
        kv_cache_gib: float | None = None,
    ) -> None:
        self.num_policies = len(mixture.objectives)
        self._mixture, self._caches = mixture, mixture.caches_kept()
        self.has_reference = self.num_policies in self._caches
        with mixture.running(0) as model:
            self.vocab_size: int = model.config.get_text_config().vocab_size
        self.device, self._longest = mixture.device, mixture.longest_texts()
        self._lanes: dict[int, _Lane] = {}
        self._next_lane = 0
        self._bytes_of = {k: self._bytes_per_token(k) for k in self._caches}
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
        taking_part = range(self.num_policies) if policies is None else policies
        self.bytes_per_token = max(1, sum(self._bytes_of[k] for k in taking_part))
        self._lanes.clear()  # of requests that an error left behind
        num_bytes = usual_kv_cache(self.device) if kv_cache_gib is None else int(kv_cache_gib * GIB)
        self.num_tokens, self.context = pool_tokens(
            num_bytes, self.bytes_per_token, max_num_seqs, [*self._longest, context]
        )
        self.kv_blocks = self.num_tokens // BLOCK_TOKENS * len(taking_part)

    def __str__(self) -> str:
        return describe_pool(self.num_tokens, self.bytes_per_token, self.context)

    def kv_blocks_used(self) -> int:
        return sum(lane.num_blocks for lane in self._lanes.values())

    def refusal(self, need: Need) -> str | None:
        if need.num_seqs > self._max_num_seqs:
            return too_many(need.num_seqs, self._max_num_seqs)
        wanted = _blocks(need)
        return too_large(need, wanted, self.kv_blocks) if wanted > self.kv_blocks else None

    def fits(self, need: Need) -> bool:
        beside = len(self._lanes) + need.num_seqs <= self._max_num_seqs
        return beside and self.kv_blocks_used() + _blocks(need) <= self.kv_blocks

    def open(self, need: Need) -> tuple[list[int], int]:
        lanes = range(self._next_lane, self._next_lane + need.num_seqs)
        self._next_lane = lanes.stop
        for number in lanes:
            caches = {k: OwnCache(caches=self._caches[k]) for k in need.policies}
            self._lanes[number] = _Lane(caches, _blocks(need) if number == lanes.start else 0)
        return list(lanes), 0

    def close(self, lanes: Sequence[int], *, spoiled: bool = False) -> None:
        for number in lanes:
            del self._lanes[number]

    @torch.inference_mode()
    def copy(self, pairs: Sequence[tuple[int, int]], length: int) -> None:
        forks = [
            (target, {k: self._lanes[source].caches[k].fork(length) for k in self._lanes[target].caches})
            for source, target in pairs
        ]
        for target, caches in forks:
            self._lanes[target].caches.update(caches)

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> Predictions:
        """Every policy of every piece, one after the other."""
        logits = torch.zeros(sum(piece.wanted for piece in pieces), self.vocab_size, device=self.device)
        policies: list[dict[int, Tensor]] = [{} for _ in logits]
        log_z = torch.full((len(logits),), torch.nan, dtype=torch.float64, device=self.device)
        first = 0
        for piece in pieces:
            rows = range(first, first := first + piece.wanted)
            for k, sequence in self._lanes[piece.lane].caches.items():
                sequence.rewind(piece.start)
                with self._mixture.running(k) as model:
                    found = sequence.extend(model, piece.tokens, piece.wanted)
                if not piece.wanted:
                    continue
                logprobs = found.log_softmax(-1)
                logits[rows] += piece.weights[k] * logprobs
                if piece.separate:
                    for row, values in zip(rows, logprobs, strict=True):
                        policies[row][k] = values
            if piece.wanted and piece.separate:
                log_z[rows] = log_normalizer(logits[rows]).double()
        return Predictions(logits, log_z, policies)

    @torch.inference_mode()
    def _bytes_per_token(self, policy: int) -> int:
        """What the model keeps of a block, as a share of its tokens; a state that does not grow is in it as well."""
        sequence = OwnCache(caches=self._caches[policy])
        with self._mixture.running(policy) as model:
            sequence.extend(model, [0] * BLOCK_TOKENS, 1)
        return -(-sequence.num_bytes // BLOCK_TOKENS)


def _blocks(need: Need) -> int:
    """Nothing is shared here."""
    return need.num_seqs * len(need.policies) * blocks_for(need.num_tokens)
