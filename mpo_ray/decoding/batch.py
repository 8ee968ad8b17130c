"""Sampling whole batches of completions from a causal language model, reproducibly.

A prompt is computed once for all its completions, and rows that have ended leave the batch, so that a few long
completions do not cost the whole batch. Neither changes what is drawn: every row has random numbers of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mpo_ray.maths.log_linear import log_normalizer
from mpo_ray.policies.apart import ApartCache
from mpo_ray.policies.block_support import carries_states
from mpo_ray.policies.cache import growing_cache
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.policies.own_cache import keeps_its_cache

#: Ended rows are dropped once they are this share of the batch: dropping copies the cache of the others.
DROPPED_SHARE = 0.125
#: Just below 1, so that u times a sum of probabilities stays below the sum when rounded.
LARGEST_UNIFORM = 1 - 2**-40
#: Tokens whose probabilities are summed before they are looked at one by one: running sums of a whole vocabulary, in
#: float64, take longer than its softmax.
CHUNK = 128


@dataclass(frozen=True, slots=True)
class Completion:
    """Token ids of one completion; `finished` if its end token, which is then the last id, came before the limit.

    Where a mixture drew it (design 2.3):
    log_z: Σ_t log Z_t over its tokens, nats
    log_z_hat: log Ẑ of its particles, nats; of the one particle of token-level decoding, `log_z`
    effective_number: how many of several particles counted in the end
    """

    ids: list[int]
    finished: bool
    log_z: float | None = None
    log_z_hat: float | None = None
    effective_number: float | None = None


@torch.no_grad()
def sample_completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_completions: int,
    max_new_tokens: int,
    temperature: float,
    end_ids: Sequence[int],
    pad_id: int,
    seed: int,
) -> list[list[Completion]]:
    """Draw `num_completions` per prompt from the model's own distribution: no top-k, no top-p, no penalties.

    prompts: token ids; temperature 0.0 is greedy; end_ids: each of them, one at least, ends a completion
    The result depends on the prompts, their order, their number of completions and `seed`; a smaller `max_new_tokens`
    cuts the same completions earlier.
    """
    num_rows = len(prompts) * num_completions
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(max_new_tokens, num_rows, generator=generator, dtype=torch.float64).clamp(max=LARGEST_UNIFORM)
    uniforms = uniforms.to(model.device)
    ends = torch.tensor(end_ids, device=model.device)
    drawn = torch.full((num_rows, max_new_tokens), end_ids[0], device=model.device)
    is_mixture = isinstance(model, MixtureForCausalLM)
    log_z = torch.zeros(num_rows, dtype=torch.float64, device=model.device)
    unfinished = torch.ones(num_rows, dtype=torch.bool, device=model.device)
    batch = DecodedBatch(model, prompts, num_completions, pad_id)
    for step in range(max_new_tokens):
        if is_mixture:
            log_z[batch.rows] += log_normalizer(batch.logits).double() * unfinished[batch.rows]
        if not batch.step(drawn, unfinished, uniforms, place=step, temperature=temperature, ends=ends):
            break
    totals = log_z.tolist() if is_mixture else [None] * num_rows
    completions = [
        cut(row, end_ids, log_z=total, log_z_hat=total) for row, total in zip(drawn.tolist(), totals, strict=True)
    ]
    return [completions[i : i + num_completions] for i in range(0, num_rows, num_completions)]


def draw_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float) -> Tensor:
    """Draw v with probability softmax(logits / temperature) in every row: the first v whose cumulative one exceeds u.

    logits: (B, V); uniforms: (B,) float64 in [0, 1); temperature: 0.0 takes the likeliest. Returns (B,).
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
    probabilities = scaled.softmax(-1)
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


class DecodedBatch:
    """The completions that are being decoded: `rows` are their numbers, `logits` (B, V) those of their next tokens."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], num_completions: int, pad_id: int) -> None:
        self._model = model
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        width = max(len(prompt) for prompt in prompts)
        padded = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        columns = torch.arange(width, device=model.device)
        mask = (columns >= width - lengths[:, None]).long()
        self._cache = _empty_cache(model, len(prompts))
        self._mask = None if bool(mask.all()) else mask
        logits = self._forward(torch.tensor(padded, device=model.device), (mask.cumsum(-1) - 1).clamp(min=0))

        self._cache.batch_repeat_interleave(num_completions)
        self._positions = (lengths - 1).repeat_interleave(num_completions)
        self.logits = logits.repeat_interleave(num_completions, dim=0)
        if self._mask is not None:
            self._mask = self._mask.repeat_interleave(num_completions, dim=0)
        self.rows = torch.arange(len(self._positions), device=model.device)

    def step(
        self, drawn: Tensor, unfinished: Tensor, uniforms: Tensor, *, place: int, temperature: float, ends: Tensor
    ) -> bool:
        """Draw the token at `place` of every completion, and go on to the next; returns whether there is a next.

        drawn: (N, T) token ids of all N completions, and unfinished: (N,), are written; uniforms: (T, N)
        ends: (E,) ids that end a completion
        """
        tokens = draw_tokens(self.logits, uniforms[place, self.rows], temperature=temperature)
        drawn[self.rows, place] = torch.where(unfinished[self.rows], tokens, ends[0])
        unfinished[self.rows] &= (tokens[:, None] != ends).all(1)
        if place + 1 == drawn.shape[1] or not bool(unfinished.any()):
            return False
        self._drop_ended(unfinished)
        self._advance(drawn[self.rows, place])
        return True

    def _drop_ended(self, unfinished: Tensor) -> None:
        """Drop the completions that have ended where they are many. unfinished: by number of the completion."""
        running = unfinished[self.rows]
        if int(running.sum()) <= (1 - DROPPED_SHARE) * len(self.rows):
            self.select(running.nonzero()[:, 0], self.rows[running])

    def select(self, places: Tensor, rows: Tensor) -> None:
        """Go on with what is at these places, as the completions of these numbers; a place may be taken repeatedly."""
        self._cache.batch_select_indices(places)
        self._mask = None if self._mask is None else self._mask[places]
        self._positions, self.logits, self.rows = self._positions[places], self.logits[places], rows

    def _advance(self, tokens: Tensor) -> None:
        """Append a token to every completion."""
        self._positions = self._positions + 1
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=1)
        self.logits = self._forward(tokens[:, None], self._positions[:, None])

    def _forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """The logits (rows, V) of the tokens after these."""
        if isinstance(self._cache, ApartCache) and not isinstance(self._model, MixtureForCausalLM):
            return self._cache.extend(lambda _: nullcontext(self._model), input_ids, self._mask, 1)[0][:, -1]
        positions = {"position_ids": position_ids} if self._takes_positions else {}
        output = self._model(
            input_ids=input_ids,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **positions,
        )
        self._cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits


def _empty_cache(model: Any, num_rows: int) -> Any:
    """A mixture makes its own, one for each policy. Rows of a family that carries states are computed apart."""
    if isinstance(model, MixtureForCausalLM):
        return None
    if carries_states(model.config) is not None:
        return ApartCache(num_rows, {0: keeps_its_cache(model)})
    return growing_cache(model.config)


def cut(ids: list[int], end_ids: Sequence[int], **figures: float | None) -> Completion:
    """A completion of what was drawn up to the limit: it ends with the first end token."""
    end = next((place for place, id in enumerate(ids) if id in end_ids), None)
    if end is None:
        return Completion(ids, finished=False, **figures)
    return Completion(ids[: end + 1], finished=True, **figures)
