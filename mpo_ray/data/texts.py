"""Texts for supervised fine-tuning: plain texts, replies to prompts, and the chosen side of preferences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mpo_ray.config_training import Source
from mpo_ray.data.fields import BadFieldError, Values, read_prompt, read_reply, read_text, read_transcripts
from mpo_ray.data.sources import DataError, Refusal, describe, read_table
from mpo_ray.records import Prompt


@dataclass(frozen=True, slots=True)
class Text:
    """What the model learns to write: `response`, after `prompt` where there is one."""

    prompt: Prompt | None
    response: str


@dataclass(frozen=True, slots=True)
class ParsedTexts:
    """What a source holds: num_rows = texts + refused. `comparisons.check_share` says when that stops a run."""

    texts: list[Text]
    refused: list[Refusal]
    num_rows: int


def read_texts(source: Source) -> ParsedTexts:
    """Read rows with `text`, with `prompt` and `response`, or with preferences, whose chosen side counts.

    Raises DataError if the rows have other columns. Bad rows are returned, not raised.
    """
    columns, rows = read_table(source)
    read = _find_form(columns, source)
    texts: list[Text] = []
    refused: list[Refusal] = []
    for row in rows:
        if isinstance(row, Refusal):
            refused.append(row)
            continue
        try:
            texts.append(read(row.values))
        except BadFieldError as error:
            refused.append(Refusal(row.where, str(error)))
    return ParsedTexts(texts, refused, len(texts) + len(refused))


def _find_form(columns: list[str], source: Source) -> Callable[[Values], Text]:
    has = set(columns).issuperset
    if has({"text"}):
        return lambda values: Text(None, read_text(values, "text"))
    for response in ("response", "chosen"):
        if has({"prompt", response}):
            return lambda values, name=response: Text(*read_reply(values, name, read_prompt(values)))  # type: ignore[misc]
    if has({"chosen", "rejected"}):
        return lambda values: Text(*read_transcripts(values)[:2])
    raise DataError(
        f"{describe(source)}: the columns {', '.join(columns)} are no texts to learn from. Rows need `text`, `prompt` "
        "and `response`, `prompt` and `chosen`, or `chosen` and `rejected` as whole transcripts. Rename columns with "
        "`rename:`."
    )
