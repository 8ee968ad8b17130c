"""What a scheduler asks of the models that it decodes with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mpo_ray.decoding.branch import Piece, Predictions
from mpo_ray.decoding.need import Need


class Runner(Protocol):
    """A mixture with its KV cache: places for sequences, and one step of them.

    has_reference: whether there is a policy more, after those of the objectives: the base of their adapters
    shares_prompts: whether a prompt that was computed is there for later requests
    context: tokens of a sequence, at most; kv_blocks: of the whole KV cache
    num_tokens: of sequences that every policy takes part in, or those of `reserve`, that it holds; bytes_per_token: of
        those
    """

    num_policies: int
    has_reference: bool
    shares_prompts: bool
    vocab_size: int
    context: int
    kv_blocks: int
    num_tokens: int
    bytes_per_token: int

    def kv_blocks_used(self) -> int: ...

    def refusal(self, need: Need) -> str | None:
        """Why there is not room for this even with nothing else, as a sentence; None where there is."""

    def fits(self, need: Need) -> bool:
        """Whether there is room now."""

    def open(self, need: Need) -> tuple[list[int], int]:
        """A lane for each sequence, and how many of the prompt's tokens the first one holds already."""

    def close(self, lanes: Sequence[int], *, spoiled: bool = False) -> None:
        """Give back all lanes of a request. spoiled: what they hold is of no use to anybody"""

    def reserve(
        self,
        *,
        max_num_seqs: int,
        context: int | None = None,
        kv_cache_gib: float | None = None,
        policies: Sequence[int] | None = None,
    ) -> None:
        """Take another KV cache in the place of the one there is, while nothing is decoded.

        policies: that take part until the next call; those of all objectives if absent
        """

    def copy(self, pairs: Sequence[tuple[int, int]], length: int) -> None:
        """Let the second lane of each pair hold the first `length` tokens of the first; a lane may be both."""

    def run(self, pieces: Sequence[Piece]) -> Predictions: ...
