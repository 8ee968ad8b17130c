"""From prompts and responses to token ids, and from sequences of different lengths to one batch.

A response is tokenised apart from its prompt, without special tokens, and ended by the tokenizer's end token, so that
what is scored is exactly what sampling produces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpo_ray.records import Prompt, encode_prompt


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


def render_prompt(tokenizer: Any, prompt: Prompt) -> str:
    """The text that precedes a response: the prompt as it is, or chat messages in the tokenizer's chat template.

    Raises ValueError if messages meet a tokenizer without a chat template.
    """
    if isinstance(prompt, str):
        return prompt
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the prompt {encode_prompt(prompt)[0][:80]!r} is a list of chat messages, but the tokenizer has no chat "
            "template; use plain string prompts, or a model whose tokenizer has one."
        )
    messages = [dict(message) for message in prompt]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def prompt_token_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Ids of a prompt with the tokenizer's own start token; a chat template writes its special tokens itself.

    A string that has no tokens becomes the start token, or the end token where there is none (an unconditional text).
    """
    text = render_prompt(tokenizer, prompt)
    # Lengths are checked where rows are accepted (limits.py), so the tokenizer need not warn of them.
    ids = list(tokenizer(text, add_special_tokens=isinstance(prompt, str), verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id]:
        ids = ids[:-1]  # some tokenizers end every text
    if not ids:
        start = tokenizer.bos_token_id
        ids = [tokenizer.eos_token_id if start is None else start]
    return ids


def response_token_ids(tokenizer: Any, response: str) -> list[int]:
    """Ids of a response and the end token."""
    return [*tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]


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
