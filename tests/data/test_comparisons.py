"""The four row forms become comparisons, every row is accounted for, and a bad row is named by place and reason."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpo_ray.config_training import Source
from mpo_ray.data.comparisons import check_refused, check_share, read_comparisons
from mpo_ray.data.sources import DataError, Refusal
from mpo_ray.records import Comparison
from tests.data.parsed import reasons, texts

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
USER = {"role": "user", "content": "hello"}
SYSTEM = {"role": "system", "content": ""}


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


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
