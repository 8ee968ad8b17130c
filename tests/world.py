"""An enumerable world: every response of a few tokens over a tiny vocabulary, so that expectations are exact sums.

A language model is a table from each prefix to the log-probabilities of the next token. Token 0 ends a response; a
response of `max_tokens` tokens is cut there and keeps its probability, so the probabilities of all responses sum to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
Response = tuple[int, ...]
Table = dict[Response, Array]

END = 0
PROMPT_TOKEN = 1


def all_responses(num_tokens: int, max_tokens: int) -> list[Response]:
    """Every response, in a fixed order."""
    finished: list[Response] = []
    growing: list[Response] = [()]
    for _ in range(max_tokens):
        finished += [(*prefix, END) for prefix in growing]
        growing = [(*prefix, token) for prefix in growing for token in range(num_tokens) if token != END]
    return finished + growing


def prefixes(num_tokens: int, max_tokens: int) -> list[Response]:
    """Every prefix that is followed by another token."""
    return sorted({response[:t] for response in all_responses(num_tokens, max_tokens) for t in range(len(response))})


def random_table(num_tokens: int, max_tokens: int, *, spread: float, rng: np.random.Generator) -> Table:
    """A language model whose next-token logits are normal with standard deviation `spread`."""
    logits = {prefix: rng.normal(0, spread, num_tokens) for prefix in prefixes(num_tokens, max_tokens)}
    return {prefix: row - np.logaddexp.reduce(row) for prefix, row in logits.items()}


def even_table(num_tokens: int, max_tokens: int) -> Table:
    """The language model under which every response is equally probable: expectations are plain means over them."""
    responses = all_responses(num_tokens, max_tokens)

    def count(prefix: Response) -> int:
        return sum(response[: len(prefix)] == prefix for response in responses)

    with np.errstate(divide="ignore"):
        return {
            prefix: np.log([count((*prefix, token)) / count(prefix) for token in range(num_tokens)])
            for prefix in prefixes(num_tokens, max_tokens)
        }


def sequence_logprobs(table: Table, responses: list[Response]) -> Array:
    """log π(y) of every response, (N,), by the chain rule one token at a time."""
    return np.array([sum(table[y[:t]][token] for t, token in enumerate(y)) for y in responses])


@dataclass(frozen=True)
class World:
    """One prompt, its reference and K policies."""

    num_tokens: int
    max_tokens: int
    reference: Table
    policies: tuple[Table, ...]

    @classmethod
    def random(
        cls, seed: int, *, num_policies: int = 3, num_tokens: int = 3, max_tokens: int = 3, spread: float = 1.0
    ) -> World:
        """K random policies and a reference under which every response is equally probable."""
        rng = np.random.default_rng(seed)
        policies = tuple(random_table(num_tokens, max_tokens, spread=spread, rng=rng) for _ in range(num_policies))
        return cls(num_tokens, max_tokens, even_table(num_tokens, max_tokens), policies)

    @cached_property
    def responses(self) -> list[Response]:
        return all_responses(self.num_tokens, self.max_tokens)

    @cached_property
    def log_reference(self) -> Array:
        """(N,) log π_ref(y)."""
        return sequence_logprobs(self.reference, self.responses)

    @cached_property
    def log_policies(self) -> Array:
        """(N, K) log π_k(y)."""
        return np.stack([sequence_logprobs(table, self.responses) for table in self.policies], axis=1)

    @cached_property
    def log_ratios(self) -> Array:
        """(N, K) ℓ_k(y); its plain mean over responses is E_ref where the reference is even."""
        return self.log_policies - self.log_reference[:, None]

    def log_mixture(self, weights: Array) -> Array:
        """(N,) log π_λ(y) of the sequence-level mixture, straight from Π_k π_k(y)^λ_k."""
        product = self.log_policies @ weights
        return np.asarray(product - np.logaddexp.reduce(product))


def model_batch(world: World, table: Table) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a causal LM with this table would see and say for all responses: logits, input_ids, completion_mask.

    Each row is one prompt token, a response, and padding. Logits where the model was not asked (after the response's
    last prediction) are large noise, so that a reader of the wrong position is found out.
    """
    length = 1 + world.max_tokens
    generator = torch.Generator().manual_seed(0)
    logits = 50 * torch.randn(len(world.responses), length, world.num_tokens, generator=generator)
    input_ids = torch.full((len(world.responses), length), END)
    mask = torch.zeros(len(world.responses), length, dtype=torch.bool)
    input_ids[:, 0] = PROMPT_TOKEN
    for row, response in enumerate(world.responses):
        input_ids[row, 1 : 1 + len(response)] = torch.tensor(response)
        mask[row, 1 : 1 + len(response)] = True
        for t in range(len(response)):
            logits[row, t] = torch.tensor(table[response[:t]], dtype=torch.float32) + 7.0 * t  # any constant will do
    return logits, input_ids, mask
