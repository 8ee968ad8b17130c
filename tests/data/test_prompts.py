"""Prompts are read once each, chosen by their content, and held out the same way for every objective."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mpo_ray.config_training import Source
from mpo_ray.data.comparisons import read_comparisons
from mpo_ray.data.prompts import (
    PlacedPrompt,
    is_heldout,
    read_prompt_lines,
    read_prompt_rows,
    read_prompts,
    select_prompts,
)
from mpo_ray.data.sources import DataError
from mpo_ray.records import prompt_id

USER = {"role": "user", "content": "hello"}
PROMPTS = [f"prompt {number}" for number in range(2000)]


def write(path: Path, *rows: object) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(path))


def test_prompts_are_read_once_each_in_order(tmp_path: Path) -> None:
    rows = [{"prompt": text, "other": number} for number, text in enumerate(["b", " a", "b", "a"])]
    assert read_prompts(write(tmp_path / "p.jsonl", *rows, {"prompt": [USER]})) == ["b", " a", "a", (USER,)]


def test_a_prompt_s_row_keeps_its_place_and_id_and_is_there_as_often_as_in_the_file(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", {"prompt": "a", "id": 7.0}, {"prompt": "a", "id": "x"}, {"prompt": [USER]})
    path = source.path
    assert read_prompt_rows(source) == [
        PlacedPrompt(f"{path}:1", "a", "7"),
        PlacedPrompt(f"{path}:2", "a", "x"),
        PlacedPrompt(f"{path}:3", (USER,)),
    ]


def test_the_lines_of_a_text_file_are_prompts(tmp_path: Path) -> None:
    """A line is used as it is, its spaces too; blank lines are none."""
    path = tmp_path / "p.txt"
    path.write_bytes(b"the film\n\n  it was\r\n")
    assert read_prompt_lines(str(path)) == [
        PlacedPrompt(f"{path}:1", "the film"),
        PlacedPrompt(f"{path}:3", "  it was"),
    ]
    path.write_text("\n \n")
    with pytest.raises(DataError, match="holds no prompts"):
        read_prompt_lines(str(path))
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match=r"p\.txt:1: not UTF-8"):
        read_prompt_lines(str(path))


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: x\n\nAssistant: b"},
        {
            "chosen": [USER, {"role": "assistant", "content": "a"}],
            "rejected": [USER, {"role": "assistant", "content": "b"}],
        },
        {
            "prompt": "hello",
            "chosen": [USER, {"role": "assistant", "content": "a"}],
            "rejected": [USER, {"role": "assistant", "content": "b"}],
        },
        {"prompt": "hello", "chosen": "a", "rejected": "b"},
    ],
)
def test_a_preference_row_has_the_same_prompt_here_as_among_the_comparisons(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    source = write(tmp_path / "p.jsonl", row)
    assert read_prompts(source) == [comparison.prompt for comparison in read_comparisons(source, "kind").comparisons]


def test_a_conversation_s_prompt_is_what_comes_before_its_last_reply(tmp_path: Path) -> None:
    reply = {"role": "assistant", "content": "a"}
    rows = [{"messages": turns} for turns in ([USER], [USER, reply], [USER, reply, USER], [USER, reply, USER, reply])]
    assert [row.prompt for row in read_prompt_rows(write(tmp_path / "p.jsonl", *rows))] == [
        (USER,),
        (USER,),
        (USER, reply, USER),
        (USER, reply, USER),
    ]
    with pytest.raises(DataError, match=r"p\.jsonl:1: field 'messages' has no prompt before"):
        read_prompts(write(tmp_path / "p.jsonl", {"messages": [reply]}))


def test_rows_without_a_prompt_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"p\.jsonl: the columns text hold no prompts"):
        read_prompts(write(tmp_path / "p.jsonl", {"text": "x"}))
    with pytest.raises(DataError, match=r"1 of 2 rows are bad(?s:.)*p\.jsonl:2: field 'prompt' is empty"):
        read_prompts(write(tmp_path / "p.jsonl", {"prompt": "x"}, {"prompt": ""}))


def test_the_choice_of_prompts_depends_on_the_seed_and_not_on_their_order() -> None:
    chosen = select_prompts(PROMPTS, 100, seed=1)
    shuffled = random.Random(0).sample(PROMPTS, len(PROMPTS))
    assert select_prompts(shuffled, 100, seed=1) == chosen
    assert len(set(chosen)) == 100
    assert select_prompts(PROMPTS, 100, seed=2) != chosen
    assert select_prompts(PROMPTS, 200, seed=1)[:100] == chosen
    assert set(select_prompts(PROMPTS[:7] * 2, 100, seed=1)) == set(PROMPTS[:7])
    assert len(select_prompts(PROMPTS[:7] * 2, 100, seed=1)) == 7


def test_the_held_out_share_is_a_seeded_split_by_prompt() -> None:
    ids = [prompt_id(prompt) for prompt in PROMPTS]
    heldout = {name for name in ids if is_heldout(name, share=0.1, seed=0)}
    assert 140 <= len(heldout) <= 260  # 200 ± 4.5 standard deviations
    assert heldout <= {name for name in ids if is_heldout(name, share=0.2, seed=0)}
    assert heldout != {name for name in ids if is_heldout(name, share=0.1, seed=1)}
    assert not any(is_heldout(name, share=0.0, seed=0) for name in ids)
    assert all(is_heldout(name, share=1.0, seed=0) for name in ids)


def test_what_is_chosen_says_nothing_about_what_is_held_out() -> None:
    chosen = select_prompts(PROMPTS, 1000, seed=0)
    share = sum(is_heldout(prompt_id(prompt), share=0.5, seed=0) for prompt in chosen) / 1000
    assert 0.43 <= share <= 0.57


def test_the_imdb_test_prompts_are_512_different_ones(shared: Path) -> None:
    prompts = read_prompts(Source(path=str(shared / "testbed/imdb/prompts_test.jsonl")))
    assert len(prompts) == len(set(prompts)) == 512
