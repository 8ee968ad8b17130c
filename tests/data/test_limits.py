"""Rows that are too long: refused or dropped, never cut."""

import pytest

from mpo_ray.data.comparisons import Parsed
from mpo_ray.data.limits import OVERLONG, Limits, check_lengths
from mpo_ray.data.rendering import Rendering
from mpo_ray.data.sources import DataError
from mpo_ray.records import Comparison
from tests.tiny import tiny_tokenizer

SHORT = Comparison("short", "the film", "good", "bad")
LONG = Comparison("long", "the film was very very very long", "good", "bad")


def _parsed(*comparisons: Comparison) -> Parsed:
    return Parsed(list(comparisons), [], {}, "pairs", len(comparisons))


def test_a_prompt_longer_than_the_context_is_an_error_that_names_it() -> None:
    limits = Limits(prompt=100, response=100, context=6)
    with pytest.raises(DataError, match=r"'x': 1 of 2 pairs.*context 6.*'long': prompt 8 tokens.*overlong: drop"):
        check_lengths(_parsed(SHORT, LONG), Rendering(tiny_tokenizer()), limits, objective="x", overlong="error")


def test_dropped_pairs_are_counted() -> None:
    limits = Limits(prompt=5, response=100, context=100)
    kept = check_lengths(_parsed(SHORT, LONG), Rendering(tiny_tokenizer()), limits, objective="x", overlong="drop")
    assert kept.comparisons == [SHORT]
    assert kept.skipped == {OVERLONG: 1}


def test_dropping_everything_is_an_error() -> None:
    limits = Limits(prompt=100, response=1, context=100)
    with pytest.raises(DataError, match="2 of 2 pairs"):
        check_lengths(_parsed(SHORT, LONG), Rendering(tiny_tokenizer()), limits, objective="x", overlong="drop")


def test_the_end_token_counts() -> None:
    """`good` and its end token are 2 tokens, with the prompt's 3 they fill a context of 5."""
    for context, fits in ((5, True), (4, False)):
        limits = Limits(prompt=100, response=100, context=context)
        assert limits.allow(3, 2) is fits
