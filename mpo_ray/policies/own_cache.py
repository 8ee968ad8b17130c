"""One sequence under one model, in the cache that transformers makes for it: slower than blocks, and for any family.

Nothing is batched or padded, so that what a layer carries from token to token (keys, a convolution, a recurrent state)
is what it is when the sequence is alone.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mpo_ray.policies.probe import MOST_DIFFERENCE, PROBE, WINDOW, difference, probe_ids
from mpo_ray.policies.short_windows import short_windows

logger = logging.getLogger(__name__)


class OwnCache:
    """The tokens of a sequence and the model's own cache of them.

    The model is given with every call: adapters on one base are one module. caches: whether to keep what the model
    carries on, as `keeps_its_cache` finds; where not, every token is a pass over all of them.
    """

    def __init__(self, *, caches: bool) -> None:
        self.tokens: list[int] = []
        self._caches = caches
        self._cache: Any = None
        self._num_cached = 0

    @property
    def num_bytes(self) -> int:
        """Of every tensor that the cache holds."""
        layers = getattr(self._cache, "layers", [])
        held = {id(tensor): tensor for layer in layers for tensor in _tensors(vars(layer))}
        return sum(tensor.nbytes for tensor in held.values())

    def fork(self, length: int) -> OwnCache:
        """The first `length` tokens as a sequence of its own."""
        other = OwnCache(caches=self._caches)
        other.tokens = self.tokens[:length]
        if length == self._num_cached and self._cache is not None:
            other._cache, other._num_cached = copy.deepcopy(self._cache), length
        return other

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens. A state cannot go back: the next token is a pass over all."""
        if length < len(self.tokens):
            self.tokens = self.tokens[:length]
            if length < self._num_cached:
                self._cache, self._num_cached = None, 0

    def extend(self, model: Any, tokens: Sequence[int], wanted: int) -> Tensor:
        """Append tokens; returns the model's logits after the last `wanted` of them, (wanted, V), in float32.

        Where none are wanted nothing is computed yet. A single token goes on from the cache; several are one pass over
        the whole text, as layers with a state take no more than one token behind it.
        """
        self.tokens += tokens
        if not wanted:
            return torch.empty(0, 0, device=model.device)
        step = self._cache is not None and self._num_cached == len(self.tokens) - 1 and wanted == 1
        if not step:
            self._cache, self._num_cached = (DynamicCache(config=model.config) if self._caches else None), 0
        begin, end = self._num_cached, len(self.tokens)
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([self.tokens[begin:]], device=model.device),
            "use_cache": self._caches,
        }
        takes = inspect.signature(model.forward).parameters
        if "position_ids" in takes:
            inputs["position_ids"] = torch.arange(begin, end, device=model.device)[None]
        if self._caches:
            inputs["cache_params" if "cache_params" in takes else "past_key_values"] = self._cache
            self._num_cached = end
        logits: Tensor = model(**inputs, logits_to_keep=wanted).logits[0, -wanted:].float()
        return logits


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those of a layer's state: some families keep them in mappings or in lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


@torch.inference_mode()
def keeps_its_cache(model: Any) -> bool:
    """Whether two sequences that take turns, token after token, have the logits of a pass over each.

    Not so where a layer keeps a state in the module, or where the cache is none that the model gives back.
    """
    texts = [probe_ids(model), probe_ids(model)[::-1]]
    with short_windows(model, WINDOW):
        expected = [model(input_ids=torch.tensor([text], device=model.device)).logits[0].float() for text in texts]
        try:
            sequences = [OwnCache(caches=True) for _ in texts]
            found: list[list[Tensor]] = [
                [sequence.extend(model, text[:5], 5)] for sequence, text in zip(sequences, texts, strict=True)
            ]
            for place in range(5, len(PROBE)):
                for number, (sequence, text) in enumerate(zip(sequences, texts, strict=True)):
                    found[number].append(sequence.extend(model, text[place : place + 1], 1))
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            # whatever the family has against it, a pass over the whole text needs no cache
            logger.info("%s is decoded without a cache: %s: %s", type(model).__name__, type(error).__name__, error)
            return False
    most = MOST_DIFFERENCE[model.dtype]
    return all(difference(torch.cat(rows), wanted) <= most for rows, wanted in zip(found, expected, strict=True))
