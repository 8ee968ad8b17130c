"""Replies that were cut at a limit: told by their rows or by their lengths, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_ray.config_training import Source
from mpo_ray.data.comparisons import read_comparisons
from mpo_ray.data.cuts import is_cut, suspected
from mpo_ray.data.limits import Limits, leave_out_overlong
from mpo_ray.data.rendering import Rendering
from mpo_ray.data.texts import read_texts
from tests.tiny import tiny_tokenizer

ASSISTANT = {"role": "assistant", "content": "good"}


def write(path: Path, *rows: object) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(path))


@pytest.mark.parametrize(
    ("said", "cut"),
    [
        ({"finish_reason": "length"}, True),
        ({"finish_reason": "stop"}, False),
        ({"stop_reason": "max_tokens"}, True),
        ({"stop_reason": "end_turn"}, False),
        ({"finish_reason": "MAX_TOKENS"}, True),
        ({"truncated": True}, True),
        ({"truncated": "true"}, True),
        ({"truncated": False, "finish_reason": "length"}, False),
        ({"finish_reason": None, "stop_reason": "length"}, True),
        ({"chosen_finish_reason": "length"}, True),
        ({"chosen_finish_reason": "stop", "finish_reason": "length"}, False),
        ({"rejected_finish_reason": "length"}, False),
        ({"finish_reason_chosen": "length"}, True),
        ({"done_reason": "length"}, True),
        ({"finishReason": "MAX_TOKENS"}, True),
        ({"stopReason": "max_tokens"}, True),
        ({"incomplete_details": {"reason": "max_output_tokens"}}, True),
        ({"incomplete_details": None, "finish_reason": "length"}, True),
        ({"finish_reason": "content_filter"}, False),
        ({"finish_reason": "FinishReason.MAX_TOKENS"}, True),
        ({"finish_reason": "max_new_tokens"}, True),
        ({"is_truncated": True}, True),
        ({"metadata": {"finish_reason": "length"}}, True),
        ({"chosen_metadata": {"finish_reason": "length"}}, True),
        ({"rejected_metadata": {"finish_reason": "length"}}, False),
        ({"chosen_metadata": {"finish_reason": "stop"}, "finish_reason": "length"}, False),
        ({"chosen": [{**ASSISTANT, "response_metadata": {"stop_reason": "max_tokens"}}]}, True),
        ({"metadata": "finish_reason: length"}, False),
        ({"chosen": [{**ASSISTANT, "finish_reason": "length"}]}, True),
        ({"finish_reason": 7}, False),
        ({}, False),
    ],
)
def test_a_row_says_whether_its_reply_was_cut(said: dict[str, Any], cut: bool) -> None:
    assert is_cut({"chosen": "good", **said}, "chosen") is cut


@pytest.mark.parametrize("key", ["finish_reason_a", "a_finish_reason", "response_a_finish_reason"])
def test_the_letter_of_a_response_is_enough(key: str) -> None:
    assert is_cut({"response_a": "x", "response_b": "y", key: "length"}, "response_a")
    assert not is_cut({"response_a": "x", "response_b": "y", key: "length"}, "response_b")


def test_every_row_form_carries_it(tmp_path: Path) -> None:
    """Pairs by the column's name, labels by the response's, ratings by the row; whole rows count for both replies."""
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    rows = {
        "pairs": ({**pair, "rejected_finish_reason": "length"}, (False, True)),
        "both": ({**pair, "truncated": True}, (True, True)),
        "labels": ({"prompt": "p", "a": "x", "b": "y", "kind": "b", "b_truncated": True}, (True, False)),
        "transcripts": (
            {
                "chosen": "\n\nHuman: x\n\nAssistant: a",
                "rejected": "\n\nHuman: x\n\nAssistant: b",
                "chosen_stop_reason": "max_tokens",
            },
            (True, False),
        ),
    }
    for name, (row, expected) in rows.items():
        [found] = read_comparisons(write(tmp_path / f"{name}.jsonl", row), "kind").comparisons
        assert (found.chosen_cut, found.rejected_cut) == expected, name
    rated = [{"prompt": "p", "response": r, "kind": n} for n, r in enumerate(("worse", "better"))]
    source = write(tmp_path / "rated.jsonl", {**rated[0], "finish_reason": "length"}, rated[1])
    [found] = read_comparisons(source, "kind").comparisons
    assert (found.chosen, found.chosen_cut, found.rejected_cut) == ("better", False, True)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "good"},
        {"prompt": "p", "response": "good"},
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"messages": [{"role": "user", "content": "p"}, ASSISTANT]},
    ],
)
def test_texts_carry_it(tmp_path: Path, row: dict[str, Any]) -> None:
    found = read_texts(write(tmp_path / "t.jsonl", {**row, "finish_reason": "length"}, row)).texts
    assert [text.is_cut for text in found] == [True, False]


def test_of_a_conversation_only_the_last_reply_is_cut(tmp_path: Path) -> None:
    user = {"role": "user", "content": "p"}
    row = {"messages": [user, ASSISTANT, user, ASSISTANT], "finish_reason": "length"}
    assert [text.is_cut for text in read_texts(write(tmp_path / "t.jsonl", row)).texts] == [False, True]


def test_a_pile_at_the_longest_length_or_at_the_limit_is_suspected() -> None:
    """Lengths that thin out have no pile; cut at 64 tokens, a third of them stand there."""
    rng = np.random.default_rng(0)
    lengths = [1 + int(n) for n in rng.geometric(0.02, size=400)]
    assert suspected(lengths, limit=512) == (0, 0)
    cut = [min(n, 64) for n in lengths]
    assert suspected(cut, limit=512) == (sum(n == 64 for n in cut), 64)
    longer = [*cut, 70, 71]  # two longer ones hide the pile from the longest length, not from the limit
    assert suspected(longer, limit=512) == (0, 0)
    assert suspected(longer, limit=64)[1] == 64
    assert suspected([], limit=64) == (0, 0)
    assert suspected([10] * 4, limit=64) == (0, 0)  # too few to tell


def test_known_cuts_are_counted_and_are_one_token_shorter(tmp_path: Path) -> None:
    """`good` cut is 1 token, finished 2: with a limit of 1 the cut one fits."""
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "the film", "chosen": "good", "rejected": "bad", "finish_reason": "length"}')
    read = read_comparisons(Source(path=str(path)), "x", accept=Rendering(tiny_tokenizer()).rendered)
    assert [c.num_tokens for c in read.comparisons] == [(3, 1, 1)]
    found = leave_out_overlong(read, Limits(prompt=10, response=1, context=10))
    assert found.comparisons == read.comparisons
    assert found.cut == {"known": 2, "suspected": 0, "of_tokens": 0}
