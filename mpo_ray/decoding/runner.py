"""One step of a mixture's policies: from the new tokens of many sequences to the distributions of their next ones.

A sequence has a *lane*: a row of the key-value cache for every policy with a weight. Nothing here knows of requests or
of drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mpo_ray.decoding.branch import PROBE, Branch, Piece, Predictions
from mpo_ray.decoding.protocol import RequestError
from mpo_ray.maths.log_linear import log_normalizer
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.policies.slot_support import NotInSlotsError


class Runner(Protocol):
    """What a scheduler asks of the model.

    has_reference: whether there is a policy more, after those of the objectives: the base of their adapters
    """

    num_policies: int
    has_reference: bool
    vocab_size: int
    context: int
    rows: int

    def rows_used(self) -> int: ...

    def rows_needed(self, policies: Sequence[int]) -> int: ...

    def fits(self, policies: Sequence[int], num_lanes: int, *, when_empty: bool = False) -> bool:
        """Whether there is room for these lanes now, or would be with nothing else."""

    def open(self, policies: Sequence[int]) -> int:
        """A lane for these policies, with room for `context` tokens."""

    def close(self, lane: int) -> None: ...

    def copy(self, pairs: Sequence[tuple[int, int]], length: int) -> None:
        """Let the second lane of each pair hold the first `length` tokens of the first; a lane may be both."""

    def run(self, pieces: Sequence[Piece]) -> Predictions: ...


class MixtureRunner:
    """A mixture's models with their rows. The mixture's own `forward` stays what it was.

    num_lanes: sequences that fit at a time if every policy takes part; lanes with fewer policies take fewer rows
    context: tokens of a row, at most the model's own context
    """

    def __init__(self, mixture: MixtureForCausalLM, *, num_lanes: int, context: int | None = None) -> None:
        """Raises NotInSlotsError for an architecture that gives something else when its rows lie in slots."""
        limits = [limit for limit in (*mixture.longest_texts(), context) if limit is not None]
        if not limits:
            raise NotInSlotsError("the model names no longest sequence, and none is given")
        self.context: int = min(limits)
        self.num_policies = len(mixture.objectives)
        everyone = mixture.branches_of(range(self.num_policies))
        row_tokens = max(self.context, len(PROBE))
        self._branches = {
            place: Branch(mixture.branches[place], mixture.objectives, policies, num_lanes, row_tokens)
            for place, policies in everyone.items()
        }
        self._branch_of = {k: branch for branch in self._branches.values() for k in branch.policies}
        self.has_reference = self.num_policies in self._branch_of
        self.vocab_size = next(iter(self._branches.values())).vocab_size
        self.rows = sum(branch.slots.num_rows for branch in self._branches.values())
        self._lanes: dict[int, dict[int, int]] = {}  # lane → policy → row
        self._next_lane = 0
        self.device = mixture.device

    def rows_used(self) -> int:
        return self.rows - sum(branch.slots.num_free for branch in self._branches.values())

    def rows_needed(self, policies: Sequence[int]) -> int:
        return len(policies)

    def fits(self, policies: Sequence[int], num_lanes: int, *, when_empty: bool = False) -> bool:
        for branch in self._branches.values():
            wanted = num_lanes * sum(k in branch.policies for k in policies)
            if wanted > (branch.slots.num_rows if when_empty else branch.slots.num_free):
                return False
        return True

    def open(self, policies: Sequence[int]) -> int:
        lane, self._next_lane = self._next_lane, self._next_lane + 1
        self._lanes[lane] = {k: self._branch_of[k].slots.take() for k in policies}
        return lane

    def close(self, lane: int) -> None:
        for k, row in self._lanes.pop(lane).items():
            self._branch_of[k].slots.give_back(row)

    @torch.inference_mode()
    def copy(self, pairs: Sequence[tuple[int, int]], length: int) -> None:
        for branch in self._branches.values():
            rows = [
                (self._lanes[source][k], self._lanes[target][k])
                for source, target in pairs
                for k in branch.policies
                if k in self._lanes[target]
            ]
            if rows:
                branch.slots.copy(rows, length)

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> Predictions:
        """Every policy of every piece, in one pass of each model."""
        total = sum(piece.wanted for piece in pieces)
        separate = [piece.separate for piece in pieces for _ in range(piece.wanted)]
        policies: list[dict[int, Tensor]] = [{} for _ in separate]
        logits: Tensor | None = None
        for branch in self._branches.values():
            part = branch.run(pieces, self._lanes, total, separate, policies)
            if part is not None:
                logits = part if logits is None else logits + part
        if logits is None:
            logits = torch.zeros(total, self.vocab_size, device=self.device)
        log_z = torch.full((total,), torch.nan, dtype=torch.float64, device=logits.device)
        if all(separate):
            log_z = log_normalizer(logits).double()
        elif any(separate):
            chosen = torch.tensor(separate, device=logits.device)
            log_z[chosen] = log_normalizer(logits[chosen]).double()
        return Predictions(logits, log_z, policies)


def check_tokens(tokens: Sequence[int], vocab_size: int, *, param: str) -> None:
    """Raises RequestError for token ids that the model does not have."""
    unknown = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if unknown is not None:
        raise RequestError(f"the token id {unknown} is not in the vocabulary of {vocab_size} tokens.", param)
