"""Rows of a batch that are computed apart: for families whose layers carry a state, which no padding may touch.

Whatever `generate()` and the samplers do to the rows of a cache (repeat, select, reorder) is done to whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from mpo_ray.policies.own_cache import OwnCache


class ApartCache(Cache):  # type: ignore[misc]
    """For each of B rows a sequence under each policy.

    caches: by policy, whether its model's own cache can be kept (`own_cache.keeps_its_cache`)
    """

    is_compileable = False

    def __init__(self, num_rows: int, caches: Mapping[int, bool]) -> None:
        super().__init__(layers=[])
        self._rows = [{k: OwnCache(caches=keeps) for k, keeps in caches.items()} for _ in range(num_rows)]
        self._length = 0
        self.policies = {*caches}

    def extend(
        self,
        running: Callable[[int], AbstractContextManager[Any]],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        num_kept: int,
    ) -> dict[int, Tensor]:
        """Append the real tokens of every row; returns logits by policy, (B, kept, V), zeros where a place is padding.

        running: gives the model of a policy; input_ids: (B, T); attention_mask: (B, all tokens so far), or None where
        all are real; num_kept: how many of the last places are wanted, 0 for all T
        """
        width = input_ids.shape[1]
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -width:]
        first = width - (num_kept or width)
        self._length += width
        logits = {}
        for k in sorted(self.policies):
            with running(k) as model:
                size = model.config.get_text_config().vocab_size
                logits[k] = torch.zeros(len(self._rows), width - first, size, device=input_ids.device)
                for row, sequences in enumerate(self._rows):
                    places = real[row].nonzero()[:, 0]
                    kept = places[places >= first]
                    found = sequences[k].extend(model, input_ids[row, places].tolist(), len(kept))
                    if len(kept):
                        logits[k][row, kept - first] = found
        return logits

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._choose([row for row in range(len(self._rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._choose(indices.tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._choose(beam_idx.tolist())

    def _choose(self, rows: list[int]) -> None:
        """A row that is chosen once goes on as it is; for more it is copied."""
        chosen, taken = [], set()
        for row in rows:
            again = row in taken
            taken.add(row)
            sequences = self._rows[row]
            chosen.append({k: s.fork(len(s.tokens)) for k, s in sequences.items()} if again else sequences)
        self._rows = chosen
