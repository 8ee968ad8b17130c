"""From sequences of different lengths to one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Right-padded sequences, each a prompt and its completion.

    input_ids: (B, T) int64; attention_mask: (B, T) int64, 1 on real tokens; completion_mask: (B, T) bool, true on the
    completion's tokens, its end token included. prompt_rows: (B,) int64, for each row the first one with the same
    prompt, perhaps itself, or None where nobody looked.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor
    prompt_rows: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> TokenBatch:
        rows = self.prompt_rows
        return TokenBatch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.completion_mask.to(device),
            None if rows is None else rows.to(device),
        )

    def repeated(self, times: int) -> TokenBatch:
        """The batch `times` times, one after the other: (times · B, T)."""
        rows = self.prompt_rows
        if rows is not None:
            rows = (torch.arange(times, device=rows.device)[:, None] * len(rows) + rows).flatten()
        return TokenBatch(
            self.input_ids.repeat(times, 1),
            self.attention_mask.repeat(times, 1),
            self.completion_mask.repeat(times, 1),
            rows,
        )


def shared_prompts(sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> torch.Tensor:
    """For each (prompt ids, completion ids) the first one with the same prompt: `TokenBatch.prompt_rows`."""
    first: dict[tuple[int, ...], int] = {}
    return torch.tensor([first.setdefault(tuple(prompt), row) for row, (prompt, _) in enumerate(sequences)])


def collate(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], *, pad_id: int) -> TokenBatch:
    """Batch (prompt ids, completion ids) pairs, padded on the right to the longest."""
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(sequences), width), dtype=torch.long)
    completion_mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, (prompt, completion) in enumerate(sequences):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor([*prompt, *completion])
        attention_mask[row, :end] = 1
        completion_mask[row, len(prompt) : end] = True
    return TokenBatch(input_ids, attention_mask, completion_mask)
