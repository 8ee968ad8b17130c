"""Caches that grow in place: whatever is done to them, they hold what a plain cache holds."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mpo_ray.policies.cache import CachePart, GrowingLayer, MixtureCache, growing_cache

OPERATIONS = {
    "one token": lambda layer: layer.update(*_states(layer, 1)),
    "many tokens": lambda layer: layer.update(*_states(layer, 40)),
    "reorder": lambda layer: layer.reorder_cache(torch.arange(layer.keys.shape[0]).flip(0)),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
    "crop": lambda layer: layer.crop(-1),
}


def _states(layer: DynamicLayer, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """New keys and values, decided by the length before them and the rows that are there."""
    rows = layer.keys.shape[0] if layer.get_seq_length() else 3
    generator = torch.Generator().manual_seed(layer.get_seq_length())
    keys, values = torch.randn(2, rows, 2, num_tokens, 4, generator=generator)
    return keys, values


@pytest.mark.parametrize("seed", range(8))
def test_a_growing_layer_is_a_dynamic_layer(seed: int) -> None:
    """Any sequence of operations leaves the same keys and values, and what was returned before is not written over."""
    growing, plain = GrowingLayer(), DynamicLayer()
    generator = torch.Generator().manual_seed(seed)
    names = ["one token", *(list(OPERATIONS)[int(torch.randint(6, (1,), generator=generator))] for _ in range(25))]
    for name in names:
        for layer in (growing, plain):
            OPERATIONS[name](layer)
        torch.testing.assert_close((growing.keys, growing.values), (plain.keys, plain.values))
        if growing.keys.shape[0] > 24 or plain.get_seq_length() < 2:
            break


def test_a_step_copies_nothing_of_the_past() -> None:
    """Within its spare room a layer's keys stay where they are; a dynamic layer copies them at every token."""
    growing = GrowingLayer()
    places = set()
    for _ in range(17):
        growing.update(*_states(growing, 1))
        places.add(growing.keys.data_ptr())
    assert len(places) == 1
    growing.update(*_states(growing, 1))
    assert growing.keys.data_ptr() not in places


def test_only_full_attention_layers_grow() -> None:
    assert {type(layer) for layer in growing_cache(LlamaConfig(num_hidden_layers=2)).layers} == {GrowingLayer}
    sliding = growing_cache(MistralConfig(num_hidden_layers=2, sliding_window=4))
    assert {type(layer) for layer in sliding.layers} == {DynamicSlidingWindowLayer}


def test_rows_of_a_mixtures_cache_are_rows_of_every_policy() -> None:
    """Row b of the mixture is row g B + b of a part with several policies, g = 0, 1, …"""

    def filled(num_policies: int) -> DynamicCache:
        cache = growing_cache(LlamaConfig(num_hidden_layers=1))
        rows = torch.arange(num_policies * 3.0)[:, None, None, None]
        cache.layers[0].update(rows, rows)
        return cache

    def rows(cache: MixtureCache) -> list[list[float]]:
        return [layer.keys.flatten().tolist() for layer in cache.layers]

    cache = MixtureCache({0: CachePart(filled(2), (0, 2)), 1: CachePart(filled(1), (1,))})
    assert cache.policies == {0, 1, 2}
    cache.reorder_cache(torch.tensor([2, 1, 1]))
    assert rows(cache) == [[2, 1, 1, 5, 4, 4], [2, 1, 1]]
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert rows(cache) == [[2, 1, 5, 4], [2, 1]]
    cache.batch_repeat_interleave(2)
    assert rows(cache) == [[2, 2, 1, 1, 5, 5, 4, 4], [2, 2, 1, 1]]
