"""The four row forms become comparisons, every row is accounted for, and a bad row is named by place and reason."""

from __future__ import annotations

import csv
import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpo_ray.config_training import Source
from mpo_ray.data.comparisons import Parsed, check_refused, check_share, read_comparisons
from mpo_ray.data.sources import DataError, Refusal
from mpo_ray.records import Comparison
from tests.data.parsed import reasons, texts

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
USER = {"role": "user", "content": "hello"}
SYSTEM = {"role": "system", "content": ""}


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """Write rows as JSONL and read them for objective `kind`."""

    def write_and_read(*rows: object, objective: str = "kind", label: str | None = None) -> Parsed:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        parsed = read_comparisons(Source(path=str(path)), objective, label)
        used = len(parsed.comparisons) * (2 if parsed.form == "ratings" else 1)
        assert parsed.num_rows == used + len(parsed.refused) + sum(parsed.skipped.values()) == len(rows)
        return parsed

    return write_and_read


# ---- pairs


def test_pairs_keep_their_texts_to_the_last_space(read: Any) -> None:
    parsed = read({"prompt": " p\n", "chosen": " c ", "rejected": "r", "weight": 2, "margin": 0.5, "id": 7, "note": 1})
    assert parsed.form == "pairs"
    assert parsed.comparisons == [Comparison("7", " p\n", " c ", "r", weight=2.0, margin=0.5)]


def test_chat_messages_become_a_prompt_of_messages_and_the_reply_s_content(read: Any) -> None:
    parsed = read({"prompt": [SYSTEM, USER], "chosen": [reply(" c")], "rejected": [reply("r")]})
    assert texts(parsed) == [((SYSTEM, USER), " c", "r")]


@pytest.mark.parametrize("prompt", ["hello", [USER]])
def test_replies_may_repeat_the_prompt_which_then_is_a_chat(read: Any, prompt: object) -> None:
    parsed = read({"prompt": prompt, "chosen": [USER, reply("c")], "rejected": [USER, reply("r")]})
    assert texts(parsed) == [((USER,), "c", "r")]


def test_ids_come_from_content_where_rows_have_none(read: Any) -> None:
    """The same row has the same id in every file; a second judgement that agrees is kept beside the first."""
    first, again, other = read(GOOD, GOOD, GOOD | {"rejected": "x"}).comparisons
    assert again.id == f"{first.id}-1"
    assert other.id != first.id
    assert read(GOOD | {"weight": 2}).comparisons[0].id == first.id


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": None}, "field 'prompt' is missing"),
        ({"chosen": ""}, "field 'chosen' is empty"),
        ({"chosen": " \n"}, "field 'chosen' is empty"),
        ({"rejected": 3}, "field 'rejected' is not text: int 3"),
        ({"rejected": "c"}, "chosen is equal to rejected"),
        ({"chosen": "\ud800"}, "field 'chosen' cannot be written as UTF-8: lone surrogate at character 1"),
        ({"weight": 0}, "weight is not positive: 0"),
        ({"weight": -1.5}, "weight is not positive: -1.5"),
        ({"weight": "much"}, "field 'weight' is not a finite number: 'much'"),
        ({"margin": -1}, "margin is negative: -1, and it says how much better chosen is"),
        ({"margin": True}, "field 'margin' is not a finite number: True"),
        ({"margin": "inf"}, "field 'margin' is not a finite number: 'inf'"),
        ({"id": [1]}, "field 'id' is neither text nor a whole number: list [1]"),
        ({"prompt": []}, "field 'prompt' is empty"),
        ({"prompt": [USER, reply("x")]}, "field 'prompt' ends with an assistant message"),
        (
            {"prompt": [{"from": "human"}]},
            "message 1 of field 'prompt' is no chat message: it needs role and content, and is {'from': 'human'}",
        ),
        ({"prompt": [USER | {"content": ""}]}, "the content of message 1 of field 'prompt' is empty"),
        ({"chosen": [USER]}, "field 'chosen' does not end with an assistant message"),
        ({"chosen": [reply("x"), reply("y")]}, "field 'chosen' ends with two assistant messages"),
        ({"chosen": [USER, reply("x")]}, "field 'chosen' begins with messages that are not the prompt"),
        (
            {"prompt": "hello", "chosen": [USER, reply("x")]},
            "fields 'chosen' and 'rejected' repeat different prompts",
        ),
    ],
)
def test_a_bad_row_is_refused_by_reason_and_place(
    read: Any, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    parsed = read(GOOD, GOOD | change)
    assert parsed.refused == [Refusal(f"{tmp_path}/rows.jsonl:2", reason)]
    assert len(parsed.comparisons) == 1


def test_a_row_without_a_field_is_refused(read: Any) -> None:
    assert reasons(read(GOOD, {"prompt": "p", "chosen": "c"})) == ["field 'rejected' is missing"]


@pytest.mark.parametrize(("written", "read_as"), [(7.0, "7"), ("7.0", "7.0"), (2.0**40, "1099511627776")])
def test_an_id_that_is_a_whole_number_is_read_as_one_however_it_is_stored(
    read: Any, written: object, read_as: str
) -> None:
    assert read(GOOD | {"id": written}, GOOD | {"id": None}).comparisons[0].id == read_as


@pytest.mark.parametrize(
    ("written", "read_as"),
    [
        (pa.array([Decimal("7.00"), None], pa.decimal128(10, 2)), "7"),
        (pa.array([UUID(int=5).bytes, None], pa.uuid()), str(UUID(int=5))),
        (pa.array([2**63 + 5, None], pa.uint64()), "9223372036854775813"),
        (pa.array(["x", None]).dictionary_encode(), "x"),
    ],
)
def test_an_id_is_read_whatever_type_its_column_has(written: pa.Array, read_as: str, tmp_path: Path) -> None:
    columns = {name: [text, f"another {text}"] for name, text in GOOD.items()}
    pq.write_table(pa.table({**columns, "id": written}), tmp_path / "rows.parquet")
    assert read_comparisons(Source(path=str(tmp_path / "rows.parquet")), "kind").comparisons[0].id == read_as


@pytest.mark.parametrize("written", [7.5, True, [1], float("inf")])
def test_an_id_that_is_no_text_and_no_whole_number_is_refused(read: Any, written: object) -> None:
    [reason] = reasons(read(GOOD | {"id": written}))
    assert reason.startswith("field 'id' is neither text nor a whole number: ")


def test_the_parts_of_a_message_are_joined_and_an_image_is_refused(read: Any) -> None:
    """As OpenAI's clients write messages."""
    said = [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "input_text", "text": "two"}]}]
    seen = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, {"type": "image_url"}]}]
    parsed = read({**GOOD, "prompt": said}, {**GOOD, "prompt": seen})
    assert parsed.comparisons[0].prompt == ({"role": "user", "content": "one two"},)
    assert "part 2 of the content of message 1 of field 'prompt' is no text but 'image_url'" in reasons(parsed)[0]


def test_float_ids_of_parquet_files_are_read(shared: Path) -> None:
    """As pandas writes integers of which some are missing."""
    source = Source(path=str(shared / "cases/data/float_id.parquet"))
    parsed = read_comparisons(source, "kind")
    assert [c.id for c in parsed.comparisons[:2]] == ["1", "2"]
    assert {reason.partition(":")[0] for reason in reasons(parsed)} <= {"duplicate id"}, "the file repeats its ids"


def test_a_duplicate_id_is_refused_and_the_first_row_with_it_kept(read: Any, tmp_path: Path) -> None:
    parsed = read(GOOD | {"id": 1}, GOOD | {"id": "1", "chosen": "x"}, GOOD | {"id": ""})
    assert parsed.refused == [
        Refusal(f"{tmp_path}/rows.jsonl:2", f"duplicate id: '1' is the id of {tmp_path}/rows.jsonl:1 too")
    ]
    assert [c.chosen for c in parsed.comparisons] == ["c", "c"]


# ---- transcripts


def transcripts(before: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"chosen": before + chosen, "rejected": before + rejected}


TURNS = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


@pytest.mark.parametrize(("chosen", "rejected"), [(" Yes", " No"), (" I do", " I don't"), (" I", " I am"), ("x", " x")])
def test_transcripts_are_cut_after_the_last_turn_they_share(read: Any, chosen: str, rejected: str) -> None:
    """However far the replies agree, and with their leading space."""
    parsed = read(transcripts(TURNS, chosen, rejected))
    assert parsed.form == "transcripts"
    assert texts(parsed) == [(TURNS, chosen, rejected)]


def test_transcripts_of_messages_are_cut_before_the_last_message(read: Any) -> None:
    before = [USER, reply("x"), USER]
    parsed = read({"chosen": [*before, reply("c")], "rejected": [*before, reply("r")]})
    assert texts(parsed) == [(tuple(before), "c", "r")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"chosen": "yes", "rejected": "no"},
            r"no turn marker in what the transcripts have in common: '\n\nAssistant:'",
        ),
        (transcripts(TURNS, " ", " No"), "the reply in 'chosen' is empty"),
        (transcripts(TURNS, " Yes", ""), "the reply in 'rejected' is empty"),
        (transcripts(TURNS, " a", " a"), "chosen is equal to rejected"),
        (transcripts(TURNS, " a\n\nHuman: d\n\nAssistant: e", " b"), "the transcripts part before their last turn"),
        (
            {"chosen": [USER, reply("c")], "rejected": [SYSTEM, USER, reply("r")]},
            "the transcripts part before their last turn",
        ),
        (
            {"chosen": [reply("c")], "rejected": [reply("r")]},
            "a transcript without a prompt: its only message is the reply",
        ),
        ({"chosen": [USER, reply("c")], "rejected": "r"}, "field 'chosen' is not text: list [{'role': 'user'"),
    ],
)
def test_a_bad_transcript_is_refused_by_reason(read: Any, row: dict[str, Any], reason: str) -> None:
    parsed = read(transcripts(TURNS, " Yes", " No"), row)
    assert len(parsed.refused) == 1
    assert parsed.refused[0].reason.startswith(reason)


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


# ---- forms and shares


def test_an_unknown_row_form_is_answered_with_the_columns_and_the_four_forms(read: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read({"question": "q", "best": "a"})
    message = str(caught.value)
    assert f"{tmp_path}/rows.jsonl: the columns question, best fit no row form" in message
    for form in ("prompt, chosen, rejected", "whole transcripts", "a label column", "a rating column"):
        assert form in message


def test_a_label_that_no_row_has_is_named(read: Any) -> None:
    with pytest.raises(
        DataError, match="no row has the column 'kind' for objective 'kind'; the columns are prompt, a, b"
    ):
        read({"prompt": "p", "a": "x", "b": "y"})
    with pytest.raises(DataError, match="fit no row form that has a label, and `label:` is 'best'"):
        read(GOOD, label="best")


def test_bad_rows_stop_a_run_unless_their_share_is_allowed(read: Any, tmp_path: Path) -> None:
    bad = [GOOD | {"rejected": "c"}] * 4 + [GOOD | {"chosen": ""}] * 3 + ["no object"]
    parsed = read(*bad, *[GOOD] * 12)
    with pytest.raises(DataError) as caught:
        check_refused(parsed, objective="kind", allow=0.39)
    message = str(caught.value)
    assert "objective 'kind': 8 of 20 rows are bad, a share of 0.4; allowed is 0.39" in message
    assert "  4 × chosen is equal to rejected\n  3 × field 'chosen' is empty\n  1 × not an object\n" in message
    assert f"  {tmp_path}/rows.jsonl:1: chosen is equal to rejected\n" in message
    assert "rows.jsonl:5: " in message
    assert "rows.jsonl:6: " not in message
    assert message.endswith("… and 3 more")
    check_refused(parsed, objective="kind", allow=0.4)


def test_an_error_counts_the_commonest_reasons_and_says_how_many_there_are() -> None:
    refused = [Refusal(f"rows.jsonl:{n}", f"kind {n // 2}: row {n}") for n in range(14)]
    with pytest.raises(DataError) as caught:
        check_share(refused, 14, what="rows", allow=0.0)
    lines = str(caught.value).splitlines()
    assert lines[1:7] == [*(f"  2 × kind {n}" for n in range(5)), "  … and 2 other reasons"]


def test_an_objective_with_no_pairs_is_an_error_whatever_is_allowed(read: Any) -> None:
    parsed = read({"prompt": "p", "a": "x", "b": "y", "kind": 0.5}, {"prompt": "p", "a": "x", "b": "x", "kind": 1})
    with pytest.raises(
        DataError, match=r"'kind': no pairs are left of 2 rows .1 refused, 1 ties.*remove the objective"
    ):
        check_refused(parsed, objective="kind", allow=1.0)


def test_parquet_holds_chat_messages_as_well(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    row = {"prompt": [USER], "chosen": [reply("c")], "rejected": [reply("r")]}
    pq.write_table(pa.Table.from_pylist([row]), path)
    assert texts(read_comparisons(Source(path=str(path)), "kind")) == [((USER,), "c", "r")]
