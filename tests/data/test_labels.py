"""What a label column says follows from its own name, its values and the responses' names, or is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from mpo_ray.data.labels import AmbiguousError, LabelColumn, read_labels, word

AB, LETTERS = ("a", "b"), ("response_a", "response_b")
FROM_0, FROM_1 = ("response_0", "response_1"), ("response_1", "response_2")


def column(name: str, responses: tuple[str, str], *others: str) -> LabelColumn:
    return LabelColumn(name, responses, responses, [name, *responses, *others])


@pytest.mark.parametrize(
    ("name", "responses", "means"),
    [
        ("kind", AB, {1: "first", 0: "second", 0.5: "tie", None: "missing"}),
        ("kind", LETTERS, {1.0: "first", 0.0: "second", float("nan"): "missing"}),
        ("kind", AB, {"1": "first", "0": "second", "": "missing"}),
        ("kind", AB, {True: "first", False: "second"}),
        ("kind", FROM_0, {True: "first", "FALSE": "second", "tie": "tie"}),
        ("kind", AB, {"A": "first", " B ": "second", "C": None}),
        ("kind", LETTERS, {"response_b": "second", "Response A": "first", "a": "first", "Tie": "tie"}),
        ("winner", AB, {"model_a": "first", "model_b": "second", "tie": "tie", "tie (bothbad)": "tie", "?": None}),
        ("winner", AB, {"first": "first", "second": "second", "both bad": "tie", "neither": "tie"}),
        ("kind", AB, {"response 1": "first", "response 2": "second"}),
        ("kind", AB, {"Response 0": "first", "Response 1": "second"}),
        ("kind", FROM_1, {"response 1": "first", "model 2": "second"}),
        ("kind", FROM_0, {"response_1": "second", "answer 0": "first"}),
        ("better_response_id", FROM_0, {0: "first", 1: "second", -1: None}),
        ("better_response_id", FROM_1, {"1": "first", 2.0: "second"}),
        ("betterResponseIdx", AB, {0: "first", 1: "second"}),
        ("preferred_index", LETTERS, {1: "first", 2: "second"}),
        ("kind", FROM_1, {1: "first", 2: "second"}),
        ("kind", FROM_1, {1: "first", 0: "second"}),
        ("winner", FROM_0, {0: "first", 1: "second"}),
        ("a_is_better", AB, {1: "first", 0: "second"}),
        ("response_a_wins", LETTERS, {1: "first", 0: "second"}),
        ("response_0_better", FROM_0, {1: "first", 0: "second"}),
        ("is_a_joke", AB, {1: "first", 0: "second"}),
    ],
)
def test_a_label_means_what_the_column_says(name: str, responses: tuple[str, str], means: Mapping[Any, Any]) -> None:
    reading = read_labels(means, column(name, responses))
    assert {label: reading.of(label) for label in means} == means


@pytest.mark.parametrize(
    ("name", "responses", "labels", "both"),
    [
        ("kind", FROM_0, [0, 1], "'response_0' is preferred, .* or that the first response is not"),
        ("kind", FROM_0, [1, 1.0], "'response_0' is preferred"),
        ("kind", AB, [1, 2], "2 may mean that the second response is preferred, or a tie"),
        ("kind", AB, [0, 1, 2], "2 may mean"),
        ("kind", AB, [-1, 0, 1], "-1 may mean that the second response is preferred, or a tie, or no label"),
        ("kind", FROM_1, [0, 1, 2], "2 may mean"),
        ("winner", AB, [0, 1], "1 may mean that the first response is preferred or, .* the second is"),
        ("chosen", AB, ["0"], "1 may mean that the first response is preferred or"),
        ("preferred", LETTERS, [1, 0], "1 may mean"),
        ("better", AB, [1.0, None], "1 may mean"),
        ("preference_id", AB, [1], r"number of the preferred response \(1\), which may be counted from 0 or from 1"),
        ("kind", AB, ["response 1"], "which may be counted from 0 or from 1"),
        ("better_response_id", FROM_0, [1, 2], "the responses are 'response_0' and 'response_1'"),
        ("worse_response_id", FROM_0, [0, 1], "may name the response that lost"),
        ("loser", AB, ["a", "b"], "may name the response that lost"),
        ("b_is_better", AB, [1, 0], "1 or true may mean that 'b' is preferred, .* or that the first response is"),
        ("b_is_better", LETTERS, [True], "'response_b' is preferred"),
        ("response_1_better", FROM_0, [1, 0], "'response_1' is preferred"),
        ("is_response_0_safe", FROM_0, [True, False], "something of this one alone"),
    ],
)
def test_labels_of_two_readings_are_refused_with_both(
    name: str, responses: tuple[str, str], labels: list[Any], both: str
) -> None:
    with pytest.raises(AmbiguousError, match=f"the column {name!r}.*{both}"):
        read_labels(labels, column(name, responses, "is_response_1_safe"))


def test_the_run_file_s_word_is_the_last_one() -> None:
    given: dict[Any, Any] = {0: "first", "1.0": "second", "None": "missing", True: "tie"}
    reading = read_labels([1], column("worse", FROM_0), given)
    asked = {0: "first", "0": "first", 1: "second", "none": "missing", "true": "tie", 2: None, "a": None}
    assert {label: reading.of(label) for label in asked} == asked


def test_labels_are_compared_in_one_form() -> None:
    assert {word(label) for label in (1, 1.0, "1", "1.0", " +1 ")} == {"1"}
    assert {word(label) for label in (True, "True", "TRUE ")} == {"true"}
    assert word("Tie  (Bothbad)") == "tie (bothbad)"
