"""Chat data as users have it, through the readers: what is kept, and which rows are bad and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpo_ray.config_training import Source
from mpo_ray.data.comparisons import check_refused, read_comparisons
from mpo_ray.data.files import DataError
from mpo_ray.data.prompts import read_prompt_rows, read_prompts
from mpo_ray.data.rendering import Rendering
from mpo_ray.data.texts import read_texts
from mpo_ray.records import ToolChat
from tests.data.templates import PLAIN_TEMPLATE, TOOL_TEMPLATE, chat_tokenizer, shown

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


@pytest.fixture
def cases(shared: Path) -> Path:
    return shared / "cases" / "data"


def write(path: Path, *rows: Any) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path))


def first_row(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text().splitlines()[0]))


@pytest.mark.parametrize("name", ["tool_calls", "tool_reply"])
def test_calls_and_tools_are_rendered_as_trl_renders_them(name: str, cases: Path) -> None:
    """Prompt and replies are TRL 1.16's, up to the newline behind the end, which is not learned."""
    from trl.data_utils import apply_chat_template

    source = cases / f"{name}.jsonl"
    rendering = Rendering(chat_tokenizer(TOOL_TEMPLATE))
    parsed = read_comparisons(Source(path=str(source)), "helpful", accept=rendering.rendered)
    check_refused(parsed, objective="helpful", allow=0.0)
    row = first_row(source)
    expected = apply_chat_template(
        {key: row[key] for key in ("prompt", "chosen", "rejected")}, rendering.tokenizer, tools=row.get("tools")
    )
    first = parsed.comparisons[0]
    for side in ("chosen", "rejected"):
        prompt, reply = rendering.ids(first.prompt, getattr(first, side))
        assert shown(rendering, prompt) == expected["prompt"]
        assert shown(rendering, reply) == expected[side].removesuffix("\n")
    assert isinstance(first.prompt, ToolChat) == ("tools" in row)
    assert "<call>" in (expected["prompt"] if name == "tool_calls" else expected["chosen"])


@pytest.mark.parametrize(("name", "key"), [("tool_calls", "tool_calls"), ("tool_reply", "tool_calls")])
def test_calls_that_the_template_does_not_read_are_refused_by_key(name: str, key: str, cases: Path) -> None:
    rendering = Rendering(chat_tokenizer(PLAIN_TEMPLATE))
    parsed = read_comparisons(Source(path=str(cases / f"{name}.jsonl")), "helpful", accept=rendering.rendered)
    assert not parsed.comparisons
    assert f"does not read {key!r}" in parsed.refused[0].reason
    assert parsed.refused[0].where.endswith(f"{name}.jsonl:1")


def test_a_row_that_the_template_refuses_is_a_bad_row_with_its_words(cases: Path) -> None:
    """One of a hundred has a system turn: named by file and line, and `allow_bad_rows` counts it."""
    rendering = Rendering(chat_tokenizer(NO_SYSTEM + PLAIN_TEMPLATE))
    source = cases / "system_turn_one.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    (line,) = [n for n, row in enumerate(rows, 1) if row["prompt"][0]["role"] == "system"]
    parsed = read_comparisons(Source(path=str(source)), "helpful", accept=rendering.rendered)
    assert len(parsed.comparisons) == len(rows) - 1
    (refusal,) = parsed.refused
    assert refusal.where == f"{source}:{line}"
    assert refusal.reason == "the chat template refuses these messages: System role not supported"
    check_refused(parsed, objective="helpful", allow=1 / len(rows))
    with pytest.raises(DataError, match=rf"system_turn_one.jsonl:{line}: the chat template refuses.*System role not"):
        check_refused(parsed, objective="helpful", allow=0.0)


def test_so_are_prompts_and_texts(tmp_path: Path) -> None:
    rendering = Rendering(chat_tokenizer(NO_SYSTEM + PLAIN_TEMPLATE))
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "be brief"}
    source = write(tmp_path / "prompts.jsonl", {"prompt": [user]}, {"prompt": [system, user]})
    with pytest.raises(DataError, match=r"prompts.jsonl:2: the chat template refuses.*System role not supported"):
        read_prompts(source, accept=rendering.rendered)
    assert read_prompts(source, accept=rendering.rendered, allow=0.5) == [(user,)]
    rows = ({"prompt": prompt, "response": "ok"} for prompt in ([user], [system, user]))
    parsed = read_texts(write(tmp_path / "texts.jsonl", *rows), accept=rendering.rendered)
    assert [text.response for text in parsed.texts] == ["ok"]
    assert parsed.refused[0].where == f"{tmp_path}/texts.jsonl:2"
    ends = ([user, {"role": "assistant", "content": "ok"}], [system, user, {"role": "assistant", "content": "ok"}])
    conversations = write(tmp_path / "messages.jsonl", *({"messages": messages} for messages in ends))
    assert len(read_texts(conversations, accept=rendering.rendered).refused) == 1


def test_texts_that_end_in_the_end_token_have_it_once(cases: Path) -> None:
    """Whichever of its end tokens the tokenizer calls its own."""
    for eos in ("<|im_end|>", "<|endoftext|>"):
        rendering = Rendering(chat_tokenizer(PLAIN_TEMPLATE, eos=eos), model_ends=[2])
        parsed = read_comparisons(Source(path=str(cases / "eos_in_text.jsonl")), "helpful", accept=rendering.rendered)
        first = parsed.comparisons[0]
        prompt, reply = rendering.ids(first.prompt, first.chosen)
        assert shown(rendering, prompt) == "<|im_start|>user\nName a bird 0<|im_end|>\n<|im_start|>assistant\n"
        assert shown(rendering, reply) == "Wren<|im_end|>"


def test_what_a_row_says_beside_its_messages_is_kept_or_refused(tmp_path: Path) -> None:
    """`tools` may be JSON text, null asks for nothing, and goes with messages alone; a call needs no content."""
    user = {"role": "user", "content": "hi", "name": None}
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    source = write(
        tmp_path / "rows.jsonl",
        {"prompt": [user], "tools": json.dumps(tools), "chosen": [calling], "rejected": "no"},
        {"prompt": [user], "tools": [], "chosen": [{**calling, "content": "I call"}], "rejected": [calling]},
        {"prompt": "hi", "tools": tools, "chosen": "yes", "rejected": "no"},
        {"prompt": [user], "tools": "none", "chosen": "yes", "rejected": "no"},
        {"prompt": [user], "chosen": [{"role": "assistant", "content": "", "name": "x"}], "rejected": "no"},
        {"prompt": "hi", "chosen": [calling], "rejected": "no"},
        {"prompt": [user], "chosen": [{**calling, "tool_calls": "f()"}], "rejected": "no"},
        {"prompt": [user], "chosen": "yes", "rejected": "no", "chat_template_kwargs": {"enable_thinking": False}},
    )
    rendering = Rendering(chat_tokenizer(TOOL_TEMPLATE))
    parsed = read_comparisons(source, "helpful", accept=rendering.rendered)
    plain = {"role": "user", "content": "hi"}
    assert [c.prompt for c in parsed.comparisons] == [ToolChat((plain,), tuple(tools)), (plain,)]
    assert parsed.comparisons[0].chosen == {"role": "assistant", "content": "", "tool_calls": [call]}
    expected = ("'tools' goes with chat", "no list of tools", "is empty", "which no chat template", "no list of calls")
    expected += ("not read row by row",)
    for refusal, words in zip(parsed.refused, expected, strict=True):
        assert words in refusal.reason
    (first, *_) = read_prompt_rows(write(tmp_path / "prompts.jsonl", {"prompt": [user], "tools": tools}))
    assert first.prompt == parsed.comparisons[0].prompt
