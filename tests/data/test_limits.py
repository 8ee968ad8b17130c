"""Rows that are too long: refused or dropped, never cut."""

import pytest

from mpo_ray.data.comparisons import Parsed
from mpo_ray.data.limits import OVERLONG, Limits, check_overlong, leave_out_overlong
from mpo_ray.data.sources import DataError
from mpo_ray.records import Comparison

SHORT = Comparison("short", "the film", "good", "bad", num_tokens=(3, 2, 2), where="p.jsonl:1")
LONG = Comparison("long", "the film was very long", "good", "bad", num_tokens=(8, 2, 2), where="p.jsonl:2")


def _parsed(*comparisons: Comparison) -> Parsed:
    return Parsed(list(comparisons), [], {}, "pairs", len(comparisons))


def test_a_prompt_longer_than_the_context_is_an_error_that_names_its_row() -> None:
    limits = Limits(prompt=100, response=100, context=6)
    found = leave_out_overlong(_parsed(SHORT, LONG), limits)
    with pytest.raises(DataError) as error:
        check_overlong(found, limits, objective="x", overlong="error")
    first, second = str(error.value).splitlines()
    assert first.startswith("objective 'x': 1 of 2 pairs are longer than max_prompt_tokens 100")
    assert "context 6 for both. Raise the limits" in first
    assert "data.overlong: drop" in first
    assert second == "  p.jsonl:2, pair 'long': prompt 8 tokens, longer response 2 tokens"


def test_an_error_names_three_rows_and_counts_the_others() -> None:
    limits = Limits(prompt=4, response=100, context=100)
    found = leave_out_overlong(_parsed(SHORT, *[LONG] * 5), limits)
    with pytest.raises(DataError, match="5 of 6 pairs") as error:
        check_overlong(found, limits, objective="x", overlong="error")
    assert str(error.value).count("pair 'long'") == 3
    assert str(error.value).endswith("… and 2 more")


def test_dropped_pairs_are_counted() -> None:
    limits = Limits(prompt=5, response=100, context=100)
    kept = leave_out_overlong(_parsed(SHORT, LONG), limits)
    check_overlong(kept, limits, objective="x", overlong="drop")
    assert kept.comparisons == [SHORT]
    assert kept.skipped == {OVERLONG: 1}


def test_dropping_everything_is_an_error() -> None:
    limits = Limits(prompt=100, response=1, context=100)
    with pytest.raises(DataError, match="2 of 2 pairs"):
        check_overlong(leave_out_overlong(_parsed(SHORT, LONG), limits), limits, objective="x", overlong="drop")


def test_the_end_token_counts() -> None:
    """`good` and its end token are 2 tokens, with the prompt's 3 they fill a context of 5."""
    for context, fits in ((5, True), (4, False)):
        limits = Limits(prompt=100, response=100, context=context)
        assert limits.allow(3, 2) is fits
        assert bool(leave_out_overlong(_parsed(SHORT), limits).comparisons) is fits
