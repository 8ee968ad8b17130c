"""A step of policies whose cache cannot lie in slots: one sequence of one policy after the other, in its own cache.

Slower than `MixtureRunner`, and right for every family: nothing is batched, nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpo_ray.decoding.branch import Piece, Predictions
from mpo_ray.maths.log_linear import log_normalizer
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.policies.own_cache import OwnCache


class SequenceRunner:
    """A `Runner` on the models' own caches. Arguments as of `MixtureRunner`; memory grows with the texts."""

    def __init__(self, mixture: MixtureForCausalLM, *, num_lanes: int, context: int | None = None) -> None:
        limits = [limit for limit in (*mixture.longest_texts(), context) if limit is not None]
        self.context: int = min(limits, default=1 << 30)
        self.num_policies = len(mixture.objectives)
        self._mixture, self._caches = mixture, mixture.caches_kept()
        self.has_reference = self.num_policies in self._caches
        with mixture.running(0) as model:
            self.vocab_size: int = model.config.get_text_config().vocab_size
        self.rows = num_lanes * self.num_policies
        self.device = mixture.device
        self._lanes: dict[int, dict[int, OwnCache]] = {}
        self._next_lane = 0

    def rows_used(self) -> int:
        return sum(len(lane) for lane in self._lanes.values())

    def rows_needed(self, policies: Sequence[int]) -> int:
        return len(policies)

    def fits(self, policies: Sequence[int], num_lanes: int, *, when_empty: bool = False) -> bool:
        return num_lanes * len(policies) <= self.rows - (0 if when_empty else self.rows_used())

    def open(self, policies: Sequence[int]) -> int:
        lane, self._next_lane = self._next_lane, self._next_lane + 1
        self._lanes[lane] = {k: OwnCache(caches=self._caches[k]) for k in policies}
        return lane

    def close(self, lane: int) -> None:
        del self._lanes[lane]

    @torch.inference_mode()
    def copy(self, pairs: Sequence[tuple[int, int]], length: int) -> None:
        forks = [
            (target, {k: self._lanes[source][k].fork(length) for k in self._lanes[target]}) for source, target in pairs
        ]
        self._lanes.update(forks)

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> Predictions:
        """Every policy of every piece, one after the other."""
        logits = torch.zeros(sum(piece.wanted for piece in pieces), self.vocab_size, device=self.device)
        policies: list[dict[int, Tensor]] = [{} for _ in logits]
        log_z = torch.full((len(logits),), torch.nan, dtype=torch.float64, device=self.device)
        first = 0
        for piece in pieces:
            rows = range(first, first := first + piece.wanted)
            for k, sequence in self._lanes[piece.lane].items():
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
