"""A pool: candidates of each prompt with their average win probabilities, and expectations under π_ref (design 2.4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpo_ray.maths.sample_table import SampleTable
from mpo_ray.maths.simplex import Array


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """N candidates of P prompts, with the probability to win against an opponent of the behaviour policy.

    primary: (N,) p̄ in [0, 1]; secondary: (N, J) q̄_j in [0, 1], J ≥ 0
    log_reference: (N,) log π_ref within the prompt's candidates, nats; sums to 1 over each prompt
    starts: (P + 1,) rows starts[p] … starts[p + 1] − 1 are the candidates of prompt p, at least 2
    """

    primary: Array
    secondary: Array
    log_reference: Array
    starts: NDArray[np.int64]

    @classmethod
    def of_samples(cls, primary: Array, secondary: Array, starts: NDArray[np.int64]) -> Pool:
        """Candidates that π_ref drew: each stands for an equal share of it."""
        return cls(primary, secondary, -np.log(np.repeat(np.diff(starts), np.diff(starts))), starts)

    @property
    def num_prompts(self) -> int:
        return len(self.starts) - 1

    @property
    def num_secondary(self) -> int:
        return int(self.secondary.shape[1])

    @property
    def joint_log_reference(self) -> Array:
        """(N,) log π_ref(y|x)/P: of prompt and candidate together, which sums to 1 over the pool."""
        return np.asarray(self.log_reference - np.log(self.num_prompts))

    def expectation(self, values: Array) -> Array:
        """E_x E_ref[v]: values (N,) or (N, C) → () or (C,)."""
        return np.asarray(np.exp(self.joint_log_reference) @ values)

    def tilted(self, tau: float, secondary: Array | None = None) -> SampleTable:
        """The pool as a table of tilts: columns (p̄, q̄_1, …)/τ, so that weights (1, λ) tilt π_ref by equation (9)."""
        values = self.secondary if secondary is None else secondary
        sizes = np.diff(self.starts)
        return SampleTable(
            np.column_stack([self.primary, values]) / tau,
            -(self.log_reference + np.log(np.repeat(sizes, sizes))),
            self.starts,
        )
