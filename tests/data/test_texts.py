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


def test_columns_that_are_no_texts_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t\.jsonl: the columns prompt, a, b are no texts to learn from"):
        read_texts(write(tmp_path / "t.jsonl", {"prompt": "p", "a": "x", "b": "y"}))


def test_the_chosen_sides_of_hh_are_texts(shared: Path) -> None:
    read = read_texts(Source(path=str(shared / "data/hh/harmless.jsonl.gz")))
    assert (len(read.texts), len(read.refused)) == (2308, 4)
