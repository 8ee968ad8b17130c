"""Texts to learn from: plain, as replies to prompts, or the chosen side of preferences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpo_ray.config_training import Source
from mpo_ray.data.sources import DataError, Refusal
from mpo_ray.data.texts import Text, read_texts

USER = {"role": "user", "content": "hello"}
REPLY = {"role": "assistant", "content": " hi"}
OTHER = {"role": "assistant", "content": "bye"}


def write(path: Path, *rows: object) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(path))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": " as it is\n"}, Text(None, " as it is\n")),
        ({"prompt": "p", "response": " r"}, Text("p", " r")),
        ({"prompt": [USER], "response": [REPLY]}, Text((USER,), " hi")),
        ({"prompt": "p", "chosen": " c", "rejected": "r"}, Text("p", " c")),
        ({"prompt": "hello", "chosen": [USER, REPLY]}, Text((USER,), " hi")),
        ({"chosen": [USER, REPLY], "rejected": [USER, OTHER]}, Text((USER,), " hi")),
        (
            {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: x\n\nAssistant: b"},
            Text("\n\nHuman: x\n\nAssistant:", " a"),
        ),
    ],
)
def test_each_form_gives_its_text(tmp_path: Path, row: dict[str, Any], text: Text) -> None:
    read = read_texts(write(tmp_path / "t.jsonl", row))
    assert (read.texts, read.refused, read.num_rows) == ([text], [], 1)


def test_bad_rows_are_refused_by_place_and_reason(tmp_path: Path) -> None:
    source = write(tmp_path / "t.jsonl", {"text": "x"}, {"text": ""}, {"other": 1}, [1])
    read = read_texts(source)
    assert read.texts == [Text(None, "x")]
    assert read.num_rows == 4
    assert read.refused == [
        Refusal(f"{source.path}:2", "field 'text' is empty"),
        Refusal(f"{source.path}:3", "field 'text' is missing"),
        Refusal(f"{source.path}:4", "not an object: a JSON list"),
    ]


SYSTEM = {"role": "system", "content": "Be short."}


def test_every_turn_of_the_assistant_is_learned_once_after_all_that_was_said_before(tmp_path: Path) -> None:
    """Turns of a conversation have one opening, so that a split does not put some of them on the other side."""
    turns = [SYSTEM, USER, REPLY, {"role": "user", "content": "and?"}, OTHER, {"role": "user", "content": "so?"}]
    read = read_texts(write(tmp_path / "t.jsonl", {"messages": turns}, {"messages": [USER, REPLY], "prompt": "hello"}))
    opening = (SYSTEM, USER)
    assert read.texts == [
        Text(opening, " hi", opening),
        Text(tuple(turns[:4]), "bye", opening),
        Text((USER,), " hi", (USER,)),
    ]
    assert (read.num_rows, read.refused, read.left_out) == (2, [], {})


def test_turns_that_are_not_learned_are_counted(tmp_path: Path) -> None:
    """A greeting replies to nothing; a message of weight 0 is not to be learned. Both are read by later turns."""
    greeted = [SYSTEM, REPLY, USER, OTHER]
    weighted = [USER, REPLY | {"weight": 0}, USER, OTHER | {"weight": 1}]
    read = read_texts(write(tmp_path / "t.jsonl", {"messages": greeted}, {"messages": weighted}))
    assert read.left_out == {"assistant turns that open a conversation": 1, "assistant turns of weight 0": 1}
    assert [text.response for text in read.texts] == ["bye", "bye"]
    assert read.texts[0].prompt == (SYSTEM, REPLY, USER)
    assert read.texts[1].prompt == (USER, REPLY, USER)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "field 'messages' is empty"),
        ("hello", "field 'messages' is no list of chat messages: 'hello'"),
        ([USER], "field 'messages' has no turn of the assistant to learn"),
        ([REPLY], "field 'messages' has no turn of the assistant to learn"),
        ([USER, REPLY, OTHER], "field 'messages' has two assistant messages in a row"),
        ([USER, {"from": "gpt"}], "message 2 of field 'messages' is no chat message"),
        ([USER, REPLY | {"weight": "x"}], "field 'weight' is not a finite number: 'x'"),
    ],
)
def test_a_conversation_without_anything_to_learn_is_refused(tmp_path: Path, messages: object, reason: str) -> None:
    [refusal] = read_texts(write(tmp_path / "t.jsonl", {"messages": messages})).refused
    assert refusal.reason.startswith(reason)


def test_conversations_for_fine_tuning_are_texts(shared: Path) -> None:
    read = read_texts(Source(path=str(shared / "cases/data/sft_messages.jsonl")))
    assert read.refused == []
    assert read.texts[0] == Text(
        ({"role": "user", "content": "Q0"},), "ok", opening=({"role": "user", "content": "Q0"},)
    )


def test_columns_that_are_no_texts_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t\.jsonl: the columns prompt, a, b are no texts to learn from"):
        read_texts(write(tmp_path / "t.jsonl", {"prompt": "p", "a": "x", "b": "y"}))


def test_the_chosen_sides_of_hh_are_texts(shared: Path) -> None:
    read = read_texts(Source(path=str(shared / "data/hh/harmless.jsonl.gz")))
    assert (len(read.texts), len(read.refused)) == (2308, 4)
