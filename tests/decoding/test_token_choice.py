"""How a token is drawn: each rule keeps exactly the tokens that its definition says, row by row."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from mpo_ray.decoding.protocol import Sampling
from mpo_ray.decoding.token_choice import CHUNK, LARGEST_UNIFORM, Draw, History, choose_tokens, draw_tokens

LOGITS = torch.log(torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]))
GRID = [(n + 0.5) / 400 for n in range(400)]


def shares(history: History | None = None, ends: tuple[int, ...] = (), **fields: Any) -> list[float]:
    """How often each token is drawn when the random numbers are evenly spread: its probability, to 1/400."""
    sampling = Sampling(100, **fields)
    draws = [Draw(sampling, history or History(), u, ends) for u in GRID]
    counts = Counter(choose_tokens(LOGITS.expand(len(GRID), -1), draws))
    return [counts[token] / len(GRID) for token in range(len(LOGITS))]


def softmax(*values: float) -> list[float]:
    """Of the logarithms: the values, normalised."""
    return [value / sum(values) for value in values]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0.5}, softmax(0.16, 0.09, 0.0225, 0.01, 0.0025)),
        ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
        ({"top_k": 2}, softmax(0.4, 0.3, 0, 0, 0)),
        ({"top_k": 9}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_p": 0.6}, softmax(0.4, 0.3, 0, 0, 0)),
        ({"top_p": 0.71}, softmax(0.4, 0.3, 0.15, 0, 0)),
        ({"top_p": 1e-9}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.3}, softmax(0.4, 0.3, 0.15, 0, 0)),
        ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, softmax(0.4, 0.3, 0, 0, 0)),
        ({"logit_bias": {0: -100.0, 4: 1.0}}, softmax(0, 0.3, 0.15, 0.1, 0.05 * np.e)),
        ({"logit_bias": {4: 100.0}, "temperature": 0.0}, [0, 0, 0, 0, 1]),
    ],
)
def test_a_rule_keeps_what_it_says(fields: dict[str, Any], expected: list[float]) -> None:
    assert shares(**fields) == pytest.approx(expected, abs=1 / 200)


def test_penalties_look_at_what_came_before() -> None:
    """Presence once, frequency per occurrence; repetition multiplies log-probabilities, of the prompt's tokens too."""
    history = History(prompt=frozenset({1}), counts=Counter({0: 3}), length=3)
    presence = softmax(0.4 * np.exp(-1.0), 0.3, 0.15, 0.1, 0.05)
    assert shares(history, presence_penalty=1.0) == pytest.approx(presence, abs=1 / 200)
    frequency = softmax(0.4 * np.exp(-1.5), 0.3, 0.15, 0.1, 0.05)
    assert shares(history, frequency_penalty=0.5) == pytest.approx(frequency, abs=1 / 200)
    repetition = softmax(0.4**1.5, 0.3**1.5, 0.15, 0.1, 0.05)
    assert shares(history, repetition_penalty=1.5) == pytest.approx(repetition, abs=1 / 200)


def test_the_end_waits_for_the_least_number_of_tokens() -> None:
    for length, expected in ((1, softmax(0, 0.3, 0.15, 0.1, 0.05)), (2, [0.4, 0.3, 0.15, 0.1, 0.05])):
        assert shares(History(length=length), ends=(0,), min_tokens=2) == pytest.approx(expected, abs=1 / 200)


def test_every_row_has_its_own_rules_and_the_logits_stay_as_they_are() -> None:
    """Rows with different rules give what they give alone; nothing is written into the model's logits."""
    rules: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"top_p": 0.5},
        {"logit_bias": {2: 5.0}},
        {"repetition_penalty": 2.0},
        {"temperature": 0.3, "top_k": 2},
    ]
    logits = torch.randn(len(rules), 50, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    draws = [
        Draw(Sampling(9, **fields), History(prompt=frozenset({1, 2})), (n + 0.5) / 6) for n, fields in enumerate(rules)
    ]
    together = choose_tokens(logits, draws)
    assert together == [choose_tokens(logits[n : n + 1], [draw])[0] for n, draw in enumerate(draws)]
    assert torch.equal(logits, before)


def test_rows_are_taken_up_to_a_constant() -> None:
    """Logits that are log-probabilities and logits that are shifted by a constant give the same tokens."""
    for fields in ({}, {"top_p": 0.5}, {"min_p": 0.2}, {"repetition_penalty": 1.5}, {"temperature": 0.7}):
        draws = [Draw(Sampling(9, **fields), History(prompt=frozenset({0, 3})), u) for u in GRID]
        rows = LOGITS.expand(len(GRID), -1)
        assert choose_tokens(rows, draws) == choose_tokens(rows + 2.5, draws)


def test_draws_invert_the_cumulative_distribution() -> None:
    """v is drawn for u in [P(<v), P(≤v)), so with probability π(v); what has probability 0 never is."""
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.125, 0.375, 0.0])
    uniforms = torch.tensor([0.0, 0.499, 0.5, 0.624, 0.625, LARGEST_UNIFORM], dtype=torch.float64)
    assert draw_tokens(probabilities.log().expand(6, -1), uniforms).tolist() == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("num_tokens", [129, 300, 1024])
def test_draws_invert_it_across_many_tokens(num_tokens: int) -> None:
    """Where tokens are looked up in two steps: P(<v) ≤ u < P(≤v) to rounding, at both ends too, and π(v) > 0."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_tokens, generator=generator)
    logits[torch.rand(num_tokens, generator=generator) < 0.5] = float("-inf")
    logits[CHUNK - 3 : CHUNK + 3] = float("-inf")
    probabilities = logits.double().softmax(-1)
    upper = probabilities.cumsum(-1)
    uniforms = torch.linspace(0, 1, 2000, dtype=torch.float64).clamp(max=LARGEST_UNIFORM)
    drawn = draw_tokens(logits.expand(2000, -1), uniforms)
    assert (probabilities[drawn] > 0).all()
    assert (uniforms <= upper[drawn] + 1e-6).all()
    assert (uniforms >= upper[drawn] - probabilities[drawn] - 1e-6).all()
