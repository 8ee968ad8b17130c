"""Labels and ratings become comparisons: which response is preferred, which are ties, what is counted."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mpo_ray.config_training import Source
from mpo_ray.data.comparisons import read_comparisons
from mpo_ray.data.sources import DataError, Refusal
from tests.data.parsed import reasons, texts

# ---- labels


@pytest.mark.parametrize("names", [("a", "b"), ("response_a", "response_b")])
@pytest.mark.parametrize(
    ("label", "preferred"),
    [(1, 0), (1.0, 0), ("1", 0), ("a", 0), ("A", 0), (True, 0), ("true", 0), (0, 1), ("0.0", 1), ("b", 1), (False, 1)],
)
def test_a_label_says_which_of_two_responses_is_preferred(
    read: Any, names: tuple[str, str], label: object, preferred: int
) -> None:
    both = ["first", "second"]
    parsed = read({"prompt": "p", names[0]: "first", names[1]: "second", "kind": label})
    assert parsed.form == "labels"
    assert texts(parsed) == [("p", both[preferred], both[1 - preferred])]


@pytest.mark.parametrize(
    ("names", "label", "chosen"),
    [
        (("response_0", "response_1"), 0, "first"),
        (("response_0", "response_1"), 1, "second"),
        (("response_1", "response_2"), "1", "first"),
        (("response_1", "response_2"), 2.0, "second"),
        (("response_1", "response_2"), "response_2", "second"),
    ],
)
def test_a_label_column_that_ends_in_id_holds_the_number_of_the_preferred_response(
    read: Any, names: tuple[str, str], label: object, chosen: str
) -> None:
    """As a win of the first response, `better_response_id` = 0 would turn every preference round in silence."""
    row = {"prompt": "p", names[0]: "first", names[1]: "second", "better_response_id": label}
    assert read(row, label="better_response_id").comparisons[0].chosen == chosen


def test_one_table_serves_several_objectives_with_ties_and_missing_labels_counted(read: Any) -> None:
    rows = [
        {"prompt": "p", "a": "1", "b": "2", "kind": 1, "short": 0},
        {"prompt": "p", "a": "3", "b": "4", "kind": 0.5, "short": None},
        {"prompt": "p", "a": "5", "b": "6", "kind": "tie", "short": ""},
        {"prompt": "p", "a": "7", "b": "8", "short": float("nan")},
        {"prompt": "p", "a": "9", "b": "10", "kind": 0.7, "short": "1"},
    ]
    kind, short = read(*rows), read(*rows, objective="short")
    assert texts(kind) == [("p", "1", "2")]
    assert kind.skipped == {"ties": 2, "missing labels": 1}
    assert reasons(kind) == [
        "unknown label: 0.7 in column 'kind'; known are 1, 0, 0.5, a, b, tie, true, false and the names of the "
        "responses, unless `label_means:` says what labels mean"
    ]
    assert texts(short) == [("p", "2", "1"), ("p", "9", "10")]
    assert short.skipped == {"missing labels": 3}
    assert texts(read(*rows, label="short")) == texts(short)


def test_labels_are_read_from_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["prompt", "a", "b", "kind", "weight"], ["p", "x", "y", "0", ""], ["p", "x", "z", "", 1]]
        )
    parsed = read_comparisons(Source(path=str(path)), "kind")
    assert texts(parsed) == [("p", "y", "x")]
    assert parsed.skipped == {"missing labels": 1}


@pytest.mark.parametrize("objective", ["helpful", "kind"])
def test_classes_that_parquet_declares_are_read_by_their_names(shared: Path, objective: str) -> None:
    """Stored as 0, `response_a` means that the first response is preferred: as a number it would mean the second."""
    parsed = read_comparisons(Source(path=str(shared / "cases/data/classlabel2.parquet")), objective)
    assert texts(parsed)[:2] == [("P0", "a", "b"), ("P1", "b", "a")]
    assert parsed.reading is not None
    assert parsed.reading.means == {"response_a": "response_a is preferred", "response_b": "response_b is preferred"}
    assert parsed.reading.example.endswith(
        'classlabel2.parquet row 1, labelled \'response_a\': after "P0", "a" is preferred to "b"'
    )


def test_the_name_that_a_column_has_in_the_file_decides_after_a_rename(tmp_path: Path) -> None:
    """PKU's `better_response_id: 0` prefers response_0, whatever the column and the responses are called here."""
    path = tmp_path / "pku.jsonl"
    row = {"prompt": "p", "response_0": "x", "response_1": "y", "better_response_id": 0, "safer_response_id": 1}
    path.write_text(json.dumps(row) + "\n")
    rename = {"better_response_id": "helpful", "safer_response_id": "harmless"}
    for more in ({}, {"response_0": "a", "response_1": "b"}, {"response_0": "response_1", "response_1": "response_2"}):
        source = Source(path=str(path), rename=rename | more)
        assert texts(read_comparisons(source, "helpful")) == [("p", "x", "y")]
        harmless = read_comparisons(source, "harmless")
        assert texts(harmless) == [("p", "y", "x")]
        assert harmless.reading is not None
        assert harmless.reading.as_text("harmless") == (
            "harmless is read from the column 'safer_response_id'; the number is that of the response that is "
            "preferred: 1 → response_1 is preferred.\n"
            f'  for example {path}:1, labelled 1: after "p", "y" is preferred to "x"'
        )


def test_labels_of_two_readings_are_refused_unless_the_run_file_says_what_they_mean(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "p", "a": "x", "b": str(label), "kind": label} for label in (-1, 0, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"rows.jsonl: the column 'kind' holds -1, 0, 1, where -1 .* `label_means: "):
        read_comparisons(Source(path=str(path)), "kind")
    parsed = read_comparisons(Source(path=str(path)), "kind", label_means={"-1": "second", "0.0": "tie", "1": "first"})
    assert texts(parsed) == [("p", "-1", "x"), ("p", "x", "1")]
    assert parsed.skipped == {"ties": 1}


# ---- ratings


def rated(prompt: str, **ratings: float | None) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "response": response, "kind": rating} for response, rating in ratings.items()]


def test_ratings_pair_the_highest_with_the_lowest_and_so_inwards(read: Any) -> None:
    parsed = read(*rated("p", low=1, middle=2.5, best=5, good=4, poor=2))
    assert parsed.form == "ratings"
    assert texts(parsed) == [("p", "best", "low"), ("p", "good", "poor")]
    assert [c.margin for c in parsed.comparisons] == [4.0, 2.0]
    assert parsed.skipped == {"unpaired responses": 1}


def test_no_response_is_chosen_or_rejected_twice(read: Any) -> None:
    """As all pairs, the best response of a prompt would be `chosen` in each (design 2.4, trap 4)."""
    rows = [row for p in range(5) for row in rated(f"p{p}", **{f"r{i}": float(i * 7 % 11) for i in range(p + 2)})]
    parsed = read(*rows)
    used = Counter((c.prompt, response) for c in parsed.comparisons for response in (c.chosen, c.rejected))
    assert set(used.values()) == {1}
    assert sum(used.values()) == 2 + 2 + 4 + 4 + 6


def test_pairs_from_ratings_do_not_depend_on_the_order_of_the_rows(read: Any) -> None:
    rows = rated("p", a=1, b=1, c=2, d=3, e=3, f=0)
    assert texts(read(*rows)) == texts(read(*rows[::-1])) != []


def test_equal_ratings_are_ties_and_missing_ratings_are_counted(read: Any) -> None:
    parsed = read(*rated("p", a=1, b=1, c=None), *rated("q", a=3, b=1), *rated("r", a=1))
    assert texts(parsed) == [("q", "a", "b")]
    assert parsed.skipped == {"ties": 2, "missing labels": 1, "unpaired responses": 1}


def test_a_rating_that_is_no_number_and_a_repeated_response_are_refused(read: Any, tmp_path: Path) -> None:
    rows = [*rated("p", a=1, b=2), *rated("p", a=3), {"prompt": "p", "response": "c", "kind": "five"}]
    assert read(*rows).refused == [
        Refusal(f"{tmp_path}/rows.jsonl:3", "the same response to the same prompt came before"),
        Refusal(f"{tmp_path}/rows.jsonl:4", "field 'kind' is not a finite number: 'five'"),
    ]


def test_a_pair_from_ratings_has_the_mean_weight_and_both_ids(read: Any) -> None:
    first, second = rated("p", a=1, b=2)
    (pair,) = read(first | {"id": "x", "weight": 1}, second | {"id": "y", "weight": 2}).comparisons
    assert (pair.id, pair.weight) == ("y/x", 1.5)


def test_of_ranks_the_lowest_is_the_best(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "p", "response": f"r{rank}", "rank": rank} for rank in (2, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source, objective in (
        (Source(path=str(path)), "rank"),
        (Source(path=str(path), rename={"rank": "kind"}), "kind"),
    ):
        parsed = read_comparisons(source, objective)
        assert [(c.chosen, c.margin) for c in parsed.comparisons] == [("r1", 1.0)]
        assert parsed.reading is not None
        assert parsed.reading.as_text(objective).startswith(
            f"{objective} is read from the column 'rank'; the lower rank"
        )
