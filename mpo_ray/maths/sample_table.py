"""The table that everything about the weights is computed from: log-ratios of sampled responses, and who drew them.

Rows of one prompt lie together. Prompts may have different numbers of responses; each prompt counts alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpo_ray.maths.simplex import Array

#: Rows that are worked on together: their temporaries stay in the processor's cache and small beside the table.
BLOCK_ROWS = 1 << 15


@dataclass(frozen=True, slots=True, eq=False)
class SampleTable:
    """N responses of P prompts under K policies.

    log_ratios: (N, K) ℓ_k(x, y) = log π_k(y|x) − log π_ref(y|x), nats; float32 or float64, may be memory-mapped
    log_proposal: (N,) log p̄(y|x)/π_ref(y|x), nats: p̄ is what the prompt's responses were drawn from as a whole
        (design 2.2, eq. 6a); 0 where π_ref drew all of them
    starts: (P + 1,) rows starts[p] … starts[p + 1] − 1 are the responses of prompt p, at least 2
    """

    log_ratios: NDArray[np.floating]
    log_proposal: NDArray[np.floating]
    starts: NDArray[np.int64]

    @classmethod
    def of_reference(cls, log_ratios: Array) -> SampleTable:
        """The paper's table: (P, S, K) log-ratios of S responses y ∼ π_ref for each prompt."""
        table = np.asarray(log_ratios)
        if table.ndim != 3 or 0 in table.shape:
            raise ValueError(
                f"the table of log-ratios has shape {table.shape}; it must be (prompts, responses per prompt, "
                "objectives), none of them 0."
            )
        prompts, responses, _ = table.shape
        rows = table.reshape(prompts * responses, -1)
        return cls(rows, np.zeros(len(rows)), np.arange(prompts + 1, dtype=np.int64) * responses)

    @property
    def num_prompts(self) -> int:
        return len(self.starts) - 1

    @property
    def num_objectives(self) -> int:
        return int(self.log_ratios.shape[1])

    @property
    def num_responses(self) -> NDArray[np.int64]:
        """(P,) responses of each prompt."""
        return np.diff(self.starts)

    def blocks(self, num_rows: int = BLOCK_ROWS) -> Iterator[tuple[slice, slice]]:
        """Yield (prompts, rows) of consecutive whole prompts, at most `num_rows` rows or one prompt at a time."""
        first = 0
        while first < self.num_prompts:
            last = int(np.searchsorted(self.starts, self.starts[first] + num_rows, side="right")) - 1
            last = max(last, first + 1)
            yield slice(first, last), slice(int(self.starts[first]), int(self.starts[last]))
            first = last

    def of_prompts(self, prompts: NDArray[np.int64]) -> SampleTable:
        """The table of these prompts alone, in the given order, in memory."""
        numbers = self.num_responses[prompts]
        starts = np.concatenate([[0], np.cumsum(numbers)])
        rows = np.repeat(self.starts[prompts] - starts[:-1], numbers) + np.arange(starts[-1])
        return SampleTable(self.log_ratios[rows], self.log_proposal[rows], starts)

    def prompt_rows(self, prompts: slice) -> NDArray[np.int64]:
        """(rows of these prompts,) the number of each row's prompt within the slice."""
        return np.repeat(
            np.arange(prompts.stop - prompts.start), np.diff(self.starts[prompts.start : prompts.stop + 1])
        )


def log_proposal(log_ratios: Array, counts: Array) -> Array:
    """log p̄(y)/π_ref(y) of the balance heuristic: p̄ = Σ_j (n_j/N) π_j over the proposals   (design 2.2, eq. 6a)

    log_ratios: (N, J) log π_j(y|x) − log π_ref(y|x) of each proposal j, nats; 0 for π_ref itself
    counts: (N, J) n_j, how many of the prompt's responses each proposal drew
    Returns (N,), nats.
    """
    with np.errstate(divide="ignore"):
        shares = np.log(counts / counts.sum(axis=1, keepdims=True))
    return np.asarray(np.logaddexp.reduce(log_ratios + shares, axis=1))
