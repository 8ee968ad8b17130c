"""Rejection sampling from the sequence-level mixture: which attempts go on, and which is the answer (design 2.3).

One rule for every engine that draws tokens from the token-level mixture q and tells its Z_t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpo_ray.decoding.protocol import NothingAcceptedError


@dataclass(frozen=True, slots=True)
class Attempt:
    """One completion from q. number: its place among the attempts of a request; random: its own numbers"""

    number: int
    random: np.random.Generator

    def survives(self, log_z: float) -> bool:
        """Whether it goes on past a token: with probability Z_t, given as its logarithm. To be asked once a token."""
        return self.random.random() < math.exp(log_z)


class Attempts:
    """The attempts of one request; several may be under way at a time.

    The first in the order of their numbers that is accepted is the answer, not the first to be finished, which would
    prefer short ones. Needs λ ≥ 0 and Σ λ ≥ 1, for which Z_t ≤ 1.
    seed: drawn if absent; most: attempts that may be made
    """

    def __init__(self, seed: int | None, most: int) -> None:
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._most, self._num_begun = most, 0
        self._accepted: int | None = None

    def begin(self) -> Attempt | None:
        """The next one; None once one is accepted, or as many were made as may be."""
        if self._accepted is not None or self._num_begun >= self._most:
            return None
        number, self._num_begun = self._num_begun, self._num_begun + 1
        return Attempt(number, np.random.default_rng([self._seed % 2**63, number]))

    def accept(self, attempt: Attempt) -> bool:
        """Take an attempt that came to its end; says whether it is the answer so far."""
        if self.is_late(attempt):
            return False
        self._accepted = attempt.number
        return True

    def is_late(self, attempt: Attempt) -> bool:
        """Whether an earlier one is accepted, so that this one plays no part any more."""
        return self._accepted is not None and self._accepted < attempt.number

    def figures(self, remedy: str) -> dict[str, Any]:
        """What `Diagnostics` has of them. remedy: what to do where none was accepted. Raises NothingAcceptedError."""
        if self._accepted is None:
            raise NothingAcceptedError(
                f"{self._num_begun} attempts were made and none was accepted: Z is about {1 / self._num_begun:.1g} or "
                f"less for this prompt and these weights. {remedy}"
            )
        return {"log_z_hat": -math.log(self._accepted + 1), "attempts": self._accepted + 1}
