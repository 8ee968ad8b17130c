"""Prompts: reading them, choosing some of them, and which of them are held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mpo_ray.config_training import Source
from mpo_ray.data.comparisons import check_share
from mpo_ray.data.fields import (
    Accept,
    BadFieldError,
    Values,
    accept_all,
    read_id,
    read_opening,
    read_prompt,
    read_reply,
    read_transcripts,
    with_tools,
)
from mpo_ray.data.files import DataError, Refusal, decoded_lines, opened
from mpo_ray.data.row_forms import RESPONSE_COLUMNS
from mpo_ray.data.sources import describe, read_table
from mpo_ray.records import Prompt, digest, prompt_id

REPLIES = ("chosen", "response", *(first for first, _ in RESPONSE_COLUMNS))


@dataclass(frozen=True, slots=True)
class PlacedPrompt:
    """A prompt, where it was read (`prompts.jsonl:3`), and the `id` of its row as text, None where it has none.

    num_tokens: 0 where nobody rendered it
    """

    where: str
    prompt: Prompt
    id: str | None = None
    num_tokens: int = field(default=0, compare=False)


def read_prompts(source: Source, *, accept: Accept = accept_all, allow: float = 0.0) -> list[Prompt]:
    """The prompts of rows with `prompt` or `messages`, or of transcripts of preferences: each once, in order.

    Other columns but `tools` are not looked at. accept: looks at every prompt (`Rendering.rendered`)
    Raises DataError where more than the share `allow` of the rows has no prompt that can be used.
    """
    rows = read_prompt_rows(source, accept=accept, allow=allow)
    return list({prompt_id(row.prompt): row.prompt for row in rows}.values())


def read_prompt_rows(source: Source, *, accept: Accept = accept_all, allow: float = 0.0) -> list[PlacedPrompt]:
    """The prompt of every row as in `read_prompts`, one that is there twice as often as it is there."""
    columns, rows = read_table(source)
    read = _find_form(columns, source)
    found: list[PlacedPrompt] = []
    refused: list[Refusal] = []
    num_rows = 0
    for row in rows:
        num_rows += 1
        if isinstance(row, Refusal):
            refused.append(row)
            continue
        try:
            kept = accept(read(row.values))
            found.append(PlacedPrompt(row.where, kept.prompt, read_id(row.values), len(kept.prompt_ids)))
        except BadFieldError as error:
            refused.append(Refusal(row.where, str(error)))
    remedy = "Correct them or take them out of the file."
    check_share(refused, num_rows, what=f"prompts of {describe(source)}", allow=allow, remedy=remedy)
    return found


def read_prompt_lines(path: str) -> list[PlacedPrompt]:
    """The lines of a text file that are not blank, each a prompt. Raises DataError."""
    with opened(path) as file:
        lines = [(f"{path}:{n}", line.rstrip("\r\n")) for n, line in enumerate(decoded_lines(file, path), 1)]
    found = [PlacedPrompt(where, line) for where, line in lines if line.strip()]
    if not found:
        raise DataError(f"{path}: holds no prompts. Write one in each line.")
    return found


def select_prompts(prompts: Sequence[Prompt], num: int, seed: int) -> list[Prompt]:
    """Choose `num` different prompts, all where there are fewer; the order of `prompts` plays no part.

    A prompt that is added or removed changes the choice by one prompt at most.
    """
    ranked = {digest(["select", seed, name := prompt_id(prompt)]) + name: prompt for prompt in prompts}
    return [ranked[key] for key in sorted(ranked)[:num]]


def is_heldout(prompt_id: str, *, share: float, seed: int) -> bool:
    """Whether a prompt is held out: a seeded hash of its id, so that all objectives and files agree."""
    return int(digest(["heldout", seed, prompt_id])[:16], 16) < share * 2**64


def _find_form(columns: Sequence[str], source: Source) -> Callable[[Values], Prompt]:
    if "prompt" in columns:
        return _prompt_of
    if {"chosen", "rejected"} <= set(columns):
        return lambda values: read_transcripts(values)[0]
    if "messages" in columns:
        return read_opening
    raise DataError(
        f"{describe(source)}: the columns {', '.join(columns)} hold no prompts. Rows need `prompt`, `messages`, or "
        "`chosen` and `rejected` as whole transcripts. Rename columns with `rename:`."
    )


def _prompt_of(values: Values) -> Prompt:
    """The prompt as `read_comparisons` has it: bare text is replaced by the messages that a reply repeats."""
    prompt = read_prompt(values)
    reply = next((name for name in REPLIES if isinstance(values.get(name), list)), None)
    return with_tools(prompt, values) if reply is None else read_reply(values, reply, prompt)[0]
