"""The reference and the K policies, held once: as single models, and as log-probabilities of completions.

Adapters share one copy of the reference; policies with full weights are loaded beside it. `mixture_of` mixes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from mpo_ray.data.tokens import collate, shared_prompts
from mpo_ray.policies.adapters import AdapterStack
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.policies.cpu import optimize_for_cpu
from mpo_ray.policies.loading import is_adapter, load_model
from mpo_ray.policies.lora_file import check_stackable
from mpo_ray.policies.precision import resolve
from mpo_ray.records import REFERENCE

#: (prompt ids, completion ids)
Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]
#: Tokens of one forward pass on a CPU: larger activations leave its caches.
MOST_TOKENS_ON_CPU = 1024


class Ensemble:
    """Models by name: `reference` and every objective, in one precision.

    stack: the reference with the policies that are adapters on it; None where it was not asked for and has none
    full: the policies with weights of their own
    """

    def __init__(
        self,
        reference: str,
        policies: Mapping[str, str],
        *,
        precision: str = "fp32",
        device: str | None = None,
        with_reference: bool = True,
    ) -> None:
        """Open all of them. device: the GPU where there is one, if absent

        precision: auto is the reference's own; see `precision.resolve`
        with_reference: whether the reference is wanted where no adapter needs it
        Raises ModelError.
        """
        self.names = list(policies)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = precision = resolve(precision, reference, self.device)
        adapters = {name: path for name, path in policies.items() if is_adapter(path)}
        for path in adapters.values():
            check_stackable(path)
        self.stack: AdapterStack | None = None
        if adapters or with_reference:
            self.stack = AdapterStack(load_model(reference, precision=precision), adapters).to(self.device)
        self.full: dict[str, Any] = {
            name: load_model(path, precision=precision).to(self.device)
            for name, path in policies.items()
            if name not in adapters
        }

    def for_decoding(self) -> Ensemble:
        """This ensemble, its models changed for being drawn from, where they are on a CPU (`cpu`)."""
        for model in (self.stack, *self.full.values()):
            if model is not None:
                optimize_for_cpu(model)
        return self

    @property
    def adapters(self) -> AdapterStack | None:
        """The stack, where a policy is in it."""
        return self.stack if self.stack is not None and self.stack.names else None

    @contextmanager
    def model(self, name: str) -> Iterator[Any]:
        """The causal LM of one policy, or of the reference, in this thread and while the block runs."""
        if name in self.full:
            yield self.full[name]
        else:
            with self._held.running([name]) as model:
                yield model

    def logprobs(
        self, names: Sequence[str], sequences: Sequences, *, batch_size: int, pad_id: int
    ) -> dict[str, list[float]]:
        """log π(completion | prompt) of every sequence under each of these, nats, summed over the completion's tokens.

        Adapters and the reference are one pass, in which every sequence is a row for each of them.
        batch_size: rows of one forward pass, at most
        """
        how: dict[str, Any] = {"batch_size": batch_size, "pad_id": pad_id}
        in_stack = () if self.stack is None else (REFERENCE, *self.stack.names)
        stacked = [name for name in in_stack if name in names]
        values: dict[str, list[float]] = {}
        if stacked:
            with self._held.running(stacked) as model:
                columns = grouped_logprobs(model, sequences, num_groups=len(stacked), **how)
            values.update(zip(stacked, columns, strict=True))
        for name in names:
            if name in self.full:
                values[name] = sequence_logprobs(self.full[name], sequences, **how)
        return {name: values[name] for name in names}

    @property
    def _held(self) -> AdapterStack:
        if self.stack is None:
            raise ValueError("this ensemble was opened without its reference, which no adapter needs")
        return self.stack


def sequence_logprobs(model: Any, sequences: Sequences, *, batch_size: int, pad_id: int) -> list[float]:
    """log π(completion | prompt) of every sequence, nats: batches of like length, each sequence at its own place."""
    [values] = grouped_logprobs(model, sequences, num_groups=1, batch_size=batch_size, pad_id=pad_id)
    return values


@torch.no_grad()
def grouped_logprobs(
    model: Any, sequences: Sequences, *, num_groups: int, batch_size: int, pad_id: int
) -> list[list[float]]:
    """`sequence_logprobs` under each policy of a model that takes `num_groups` groups of rows, one for each policy."""
    completions = CompletionModel(model)
    values = [[0.0] * len(sequences) for _ in range(num_groups)]
    most_tokens = MOST_TOKENS_ON_CPU if model.device.type == "cpu" else None
    order = by_prompt(sequences) if completions.packs else by_length(sequences)
    for rows in _batches(sequences, order, copies=num_groups, most_rows=batch_size, most_tokens=most_tokens):
        chosen = [sequences[i] for i in rows]
        batch = replace(collate(chosen, pad_id=pad_id), prompt_rows=shared_prompts(chosen)).to(model.device)
        found = completions(batch.repeated(num_groups)).double().view(num_groups, -1).tolist()
        for column, results in zip(values, found, strict=True):
            for i, value in zip(rows, results, strict=True):
                column[i] = value
    return values


def by_length(sequences: Sequences) -> list[int]:
    """The places of all sequences, shortest first: batches of neighbours need little padding."""
    return sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]) + len(sequences[i][1]))


def by_prompt(sequences: Sequences) -> list[int]:
    """The places of all sequences, those of one prompt together, prompts in the order of their longest sequence."""
    longest: dict[tuple[int, ...], int] = {}
    for prompt, completion in sequences:
        key = tuple(prompt)
        longest[key] = max(longest.get(key, 0), len(prompt) + len(completion))
    return sorted(range(len(sequences)), key=lambda i: (longest[tuple(sequences[i][0])], tuple(sequences[i][0]), i))


def _batches(
    sequences: Sequences, order: Sequence[int], *, copies: int, most_rows: int, most_tokens: int | None
) -> Iterator[list[int]]:
    """The order, cut where `copies` of a batch would have too many rows or tokens; one sequence is always allowed."""
    batch: list[int] = []
    tokens = 0
    for i in order:
        length = copies * (len(sequences[i][0]) + len(sequences[i][1]))
        too_long = most_tokens is not None and tokens + length > most_tokens
        if batch and (too_long or (len(batch) + 1) * copies > most_rows):
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += length
    if batch:
        yield batch
