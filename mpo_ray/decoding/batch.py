"""Sampling whole batches of completions with transformers' own `generate`, reproducibly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Completion:
    """Token ids of one completion; `finished` if its end token, which is then the last id, came before the limit."""

    ids: list[int]
    finished: bool


def sample_completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_completions: int,
    max_new_tokens: int,
    temperature: float,
    eos_id: int,
    pad_id: int,
    seed: int,
) -> list[list[Completion]]:
    """Draw `num_completions` per prompt from the model's own distribution: no top-k, no top-p, no penalties.

    prompts: token ids; temperature 0.0 is greedy. The result depends on the batch as a whole and on `seed`.
    """
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    how = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids.repeat_interleave(num_completions, dim=0).to(model.device),
            attention_mask=mask.repeat_interleave(num_completions, dim=0).to(model.device),
            max_new_tokens=max_new_tokens,
            top_k=0,
            top_p=1.0,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
            **how,
        )
    completions = [_cut(row, eos_id) for row in output[:, width:].tolist()]
    return [completions[i : i + num_completions] for i in range(0, len(completions), num_completions)]


def _cut(ids: list[int], eos_id: int) -> Completion:
    if eos_id not in ids:
        return Completion(ids, finished=False)
    return Completion(ids[: ids.index(eos_id) + 1], finished=True)
