"""Drawing one sequence token by token from a causal language model: whoever stops asking stops the decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def stream_tokens(
    model: Any,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    eos_ids: Sequence[int],
    generator: torch.Generator,
    weights: Tensor | None = None,
) -> Iterator[int]:
    """Yield the tokens of one completion, its end token included. Each is decoded when it is asked for and not before.

    temperature: 0.0 is greedy; top_p: the smallest set of tokens with this probability is kept, 1.0 keeps all
    weights: (K,) λ for a mixture, else the model's own; generator: lives on the CPU
    """
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    extra = {} if weights is None else {"mixture_weights": weights[None]}
    cache = None
    for _ in range(max_new_tokens):
        with torch.no_grad():
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
        cache = output.past_key_values
        token = draw_token(output.logits[0, -1], temperature=temperature, top_p=top_p, generator=generator)
        yield token
        if token in eos_ids:
            return
        ids = torch.tensor([[token]], device=model.device)


def draw_token(logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw v with probability softmax(logits / temperature), restricted to the top_p nucleus. logits: (V,)."""
    if temperature == 0.0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.double().cpu() / temperature, dim=-1)
    if top_p < 1.0:
        probabilities = nucleus(probabilities, top_p)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the most likely tokens until their probability reaches top_p, one at least; others become 0. (V,) → (V,)."""
    ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities).scatter(0, order, ordered.where(before < top_p, 0.0))
