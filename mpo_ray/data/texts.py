"""Texts for supervised fine-tuning: plain texts, replies to prompts, conversations, the chosen side of preferences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from mpo_ray.config_training import Source
from mpo_ray.data.cuts import is_cut
from mpo_ray.data.fields import (
    Accept,
    BadFieldError,
    Values,
    accept_all,
    read_prompt,
    read_reply,
    read_text,
    read_transcripts,
    read_turns,
)
from mpo_ray.data.sources import DataError, Refusal, describe, read_table
from mpo_ray.records import Prompt, Reply


@dataclass(frozen=True, slots=True)
class Text:
    """What the model learns to write: `response`, after `prompt` where there is one.

    opening: of the conversation that it is a turn of, None elsewhere; all turns of one are on one side of a split
    is_cut: whether the response was cut at a limit, so that it does not end where it stops
    prompt_ids, response_ids: what is learned of it, with an end token where it is not cut; empty where nobody rendered
    where: its row's place (`texts.jsonl:3`)
    """

    prompt: Prompt | None
    response: Reply
    opening: Prompt | None = None
    is_cut: bool = False
    prompt_ids: list[int] = field(default_factory=list, compare=False)
    response_ids: list[int] = field(default_factory=list, compare=False)
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class ParsedTexts:
    """What a source holds. `comparisons.check_share` says when refused rows stop a run.

    A row that is not refused gives one text, a conversation one for each turn of the assistant but those `left_out`.
    """

    texts: list[Text]
    refused: list[Refusal]
    num_rows: int
    left_out: dict[str, int]


def read_texts(source: Source, *, accept: Accept = accept_all) -> ParsedTexts:
    """Read rows with `text`, with `prompt` and `response`, with preferences, whose chosen side counts, or `messages`.

    accept: looks at the prompt and the response of every row (`Rendering.rendered`)
    Raises DataError if the rows have other columns. Bad rows are returned, not raised.
    """
    columns, rows = read_table(source)
    read = _find_form(columns, source)
    texts: list[Text] = []
    refused: list[Refusal] = []
    left_out: Counter[str] = Counter()
    num_rows = 0
    for row in rows:
        num_rows += 1
        if isinstance(row, Refusal):
            refused.append(row)
            continue
        try:
            found, without = read(row.values)
            found = [_accepted(replace(text, where=row.where), accept) for text in found]
        except BadFieldError as error:
            refused.append(Refusal(row.where, str(error)))
        else:
            texts += found
            left_out.update(without)
    return ParsedTexts(texts, refused, num_rows, dict(left_out))


def _accepted(text: Text, accept: Accept) -> Text:
    found = accept("" if text.prompt is None else text.prompt, text.response, cut=(text.is_cut,))
    return replace(
        text,
        prompt=None if text.prompt is None else found.prompt,
        response=found.replies[0],
        prompt_ids=found.prompt_ids,
        response_ids=found.reply_ids[0],
    )


#: A row's texts, and why turns of its conversation give none.
_Read = Callable[[Values], tuple[list[Text], list[str]]]


def _find_form(columns: list[str], source: Source) -> _Read:
    has = set(columns).issuperset
    if has({"text"}):
        return lambda values: ([Text(None, read_text(values, "text"), is_cut=is_cut(values, "text"))], [])
    for response in ("response", "chosen"):
        if has({"prompt", response}):
            return partial(_read_reply, response)
    if has({"chosen", "rejected"}):
        return lambda values: ([Text(*read_transcripts(values)[:2], is_cut=is_cut(values, "chosen"))], [])
    if has({"messages"}):
        return _read_conversation
    raise DataError(
        f"{describe(source)}: the columns {', '.join(columns)} are no texts to learn from. Rows need `text`, `prompt` "
        "and `response`, `prompt` and `chosen`, `chosen` and `rejected` as whole transcripts, or `messages`. Rename "
        "columns with `rename:`."
    )


def _read_reply(response: str, values: Values) -> tuple[list[Text], list[str]]:
    return [Text(*read_reply(values, response, read_prompt(values)), is_cut=is_cut(values, response))], []


def _read_conversation(values: Values) -> tuple[list[Text], list[str]]:
    turns = read_turns(values)
    opening = turns.learned[0][0]
    texts = [Text(prompt, reply, opening) for prompt, reply in turns.learned]
    texts[-1] = replace(texts[-1], is_cut=is_cut(values, "messages"))  # what a row says is about its last reply
    return texts, turns.left_out
