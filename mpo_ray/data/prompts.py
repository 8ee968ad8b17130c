"""Prompts: reading them, choosing some of them, and which of them are held out."""

from __future__ import annotations

from collections.abc import Sequence

from mpo_ray.config_training import Source
from mpo_ray.data.comparisons import check_share
from mpo_ray.data.fields import BadFieldError, Values, read_prompt, read_reply, read_transcripts
from mpo_ray.data.row_forms import RESPONSE_COLUMNS
from mpo_ray.data.sources import DataError, Refusal, describe, read_table
from mpo_ray.records import Prompt, digest, prompt_id

REPLIES = ("chosen", "response", *(first for first, _ in RESPONSE_COLUMNS))


def read_prompts(source: Source) -> list[Prompt]:
    """The prompts of rows with `prompt`, or of preference rows in the form of transcripts: each once, in order.

    Other columns are not looked at. Raises DataError for rows without a prompt, as nothing here allows a share of them.
    """
    columns, rows = read_table(source)
    if "prompt" not in columns and not {"chosen", "rejected"} <= set(columns):
        raise DataError(
            f"{describe(source)}: the columns {', '.join(columns)} hold no prompts. Rows need `prompt`, or `chosen` "
            "and `rejected` as whole transcripts. Rename columns with `rename:`."
        )
    found: dict[str, Prompt] = {}
    refused: list[Refusal] = []
    num_rows = 0
    for row in rows:
        num_rows += 1
        if isinstance(row, Refusal):
            refused.append(row)
            continue
        try:
            prompt = _prompt_of(row.values) if "prompt" in columns else read_transcripts(row.values)[0]
        except BadFieldError as error:
            refused.append(Refusal(row.where, str(error)))
        else:
            found.setdefault(prompt_id(prompt), prompt)
    remedy = "Correct them or take them out of the file."
    check_share(refused, num_rows, what=f"prompts of {describe(source)}", allow=0.0, remedy=remedy)
    return list(found.values())


def select_prompts(prompts: Sequence[Prompt], num: int, seed: int) -> list[Prompt]:
    """Choose `num` different prompts, all where there are fewer; the order of `prompts` plays no part.

    A prompt that is added or removed changes the choice by one prompt at most.
    """
    ranked = {digest(["select", seed, name := prompt_id(prompt)]) + name: prompt for prompt in prompts}
    return [ranked[key] for key in sorted(ranked)[:num]]


def is_heldout(prompt_id: str, *, share: float, seed: int) -> bool:
    """Whether a prompt is held out: a seeded hash of its id, so that all objectives and files agree."""
    return int(digest(["heldout", seed, prompt_id])[:16], 16) < share * 2**64


def _prompt_of(values: Values) -> Prompt:
    """The prompt as `read_comparisons` has it: bare text is replaced by the messages that a reply repeats."""
    prompt = read_prompt(values)
    reply = next((name for name in REPLIES if isinstance(values.get(name), list)), None)
    return prompt if reply is None else read_reply(values, reply, prompt)[0]
