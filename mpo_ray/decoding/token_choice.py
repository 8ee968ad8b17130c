"""Drawing the next token of many completions at a time, each by its own rules and its own random number.

A completion's tokens depend on its logits and its numbers alone, not on who is beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from mpo_ray.decoding.protocol import Sampling

#: Just below 1, so that u times a sum of probabilities stays below the sum when rounded.
LARGEST_UNIFORM = 1 - 2**-40
#: Tokens whose probabilities are summed before they are looked at one by one: running sums of a whole vocabulary, in
#: float64, take longer than its softmax.
CHUNK = 128


@dataclass(slots=True)
class History:
    """The tokens that penalties look at: which ones the prompt has, and how often the completion has each."""

    prompt: frozenset[int] = frozenset()
    counts: Counter[int] = field(default_factory=Counter)
    length: int = 0

    def add(self, token: int) -> None:
        self.counts[token] += 1
        self.length += 1


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to draw. uniform: in [0, 1); ends: the ids that end the completion, kept out before `min_tokens`."""

    sampling: Sampling
    history: History
    uniform: float
    ends: Sequence[int] = ()


def choose_tokens(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Draw a token for every row: penalties and bias, temperature, min-p, top-k, top-p, in this order.

    logits: (N, V) float32, log-probabilities up to a constant of each row; they are not changed.
    """
    if all(_is_plain(draw) for draw in draws):
        adjusted = logits
    else:
        adjusted = logits.clone()
        for row, draw in zip(adjusted, draws, strict=True):
            _adjust(row, draw)
    temperatures = [draw.sampling.temperature for draw in draws]
    greedy = [n for n, temperature in enumerate(temperatures) if temperature == 0.0]
    if len(greedy) == len(draws):
        return adjusted.argmax(-1).tolist()
    divisors = [temperature or 1.0 for temperature in temperatures]
    if any(divisor != 1.0 for divisor in divisors):
        adjusted = adjusted / torch.tensor(divisors, device=logits.device)[:, None]
    limited = [n for n, draw in enumerate(draws) if _limits(draw.sampling)]
    if limited:
        if adjusted is logits:
            adjusted = logits.clone()
        for n in limited:
            adjusted[n] = _limit(adjusted[n], draws[n].sampling)
    uniforms = torch.tensor([draw.uniform for draw in draws], dtype=torch.float64, device=logits.device)
    tokens: list[int] = draw_tokens(adjusted, uniforms).tolist()
    for n in greedy:
        tokens[n] = int(adjusted[n].argmax())
    return tokens


def draw_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw v with probability softmax(logits) in every row: the first v whose cumulative one exceeds u.

    logits: (B, V); uniforms: (B,) float64 in [0, 1). Returns (B,).
    """
    probabilities = logits.float().softmax(-1)
    missing = -probabilities.shape[-1] % CHUNK
    if missing:
        probabilities = pad(probabilities, (0, missing))
    # first the chunk in which the cumulative probability exceeds u, then the token in it
    chunks = probabilities.view(len(probabilities), -1, CHUNK)
    cumulative = chunks.sum(-1).cumsum(-1, dtype=torch.float64)
    thresholds = uniforms[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, thresholds, right=True)
    before = pad(cumulative, (1, 0)).gather(1, found)
    within = chunks[torch.arange(len(chunks), device=chunks.device), found[:, 0]].cumsum(-1, dtype=torch.float64)
    left = (thresholds - before).minimum(within[:, -1:] * LARGEST_UNIFORM)  # the sums of a chunk may round differently
    return (found * CHUNK + torch.searchsorted(within, left, right=True))[:, 0]


def _is_plain(draw: Draw) -> bool:
    """Whether the logits are taken as they are."""
    one = draw.sampling
    return (
        one.repetition_penalty == 1.0
        and one.presence_penalty == 0.0
        and one.frequency_penalty == 0.0
        and not one.logit_bias
        and draw.history.length >= one.min_tokens
    )


def _adjust(row: Tensor, draw: Draw) -> None:
    """Penalties, bias and the end before `min_tokens`, in place. row: (V,)."""
    sampling, history = draw.sampling, draw.history
    if sampling.repetition_penalty != 1.0:
        # over or under a constant matters here: of log-probabilities, which are below 0
        row -= row.logsumexp(-1)
        seen = torch.tensor(sorted(history.prompt | history.counts.keys()), dtype=torch.long, device=row.device)
        row[seen] *= sampling.repetition_penalty
    if history.counts and (sampling.presence_penalty or sampling.frequency_penalty):
        tokens = torch.tensor(list(history.counts), device=row.device)
        counts = torch.tensor(list(history.counts.values()), dtype=row.dtype, device=row.device)
        row[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    for token, bias in sampling.logit_bias.items():
        row[token] += bias
    if history.length < sampling.min_tokens:
        row[list(draw.ends)] = float("-inf")


def _limits(sampling: Sampling) -> bool:
    return sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0)


def _limit(row: Tensor, sampling: Sampling) -> Tensor:
    """Keep the tokens of min-p, top-k and the top-p nucleus, one at least; the others become −∞. (V,) → (V,)."""
    nothing = float("-inf")
    if sampling.min_p > 0.0:
        row = row.masked_fill(row < row.max() + torch.tensor(sampling.min_p, device=row.device).log(), nothing)
    if sampling.top_k > 0 or sampling.top_p < 1.0:
        ordered, order = row.sort(descending=True, stable=True)
        if sampling.top_k > 0:
            ordered[sampling.top_k :] = nothing
        if sampling.top_p < 1.0:
            probabilities = ordered.double().softmax(-1)
            before = probabilities.cumsum(-1) - probabilities
            ordered[(before >= sampling.top_p).nonzero()] = nothing
            # the likeliest always stays: nothing comes before it, and top_p is above 0
        row = torch.full_like(row, nothing).scatter_(0, order, ordered)
    return row
