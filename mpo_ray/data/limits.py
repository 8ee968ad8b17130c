"""How long rows may be: what the config and the model's context allow, and what happens to longer ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import AutoConfig

from mpo_ray.data.comparisons import Parsed
from mpo_ray.data.cuts import suspected
from mpo_ray.data.sources import DataError

OVERLONG = "overlong"
Overlong = Literal["error", "drop"]
#: How many rows that are too long an error names.
NUM_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper limits in tokens: of the prompt, of the response with its end token, and of both together."""

    prompt: int
    response: int
    context: int

    def allow(self, prompt: int, response: int) -> bool:
        return prompt <= self.prompt and response <= self.response and prompt + response <= self.context

    def __str__(self) -> str:
        return (
            f"max_prompt_tokens {self.prompt}, max_response_tokens {self.response}, or the model's context "
            f"{self.context} for both"
        )


def model_context(model: str) -> int:
    """The longest sequence a model takes, by its configuration."""
    longest = longest_text(AutoConfig.from_pretrained(model, trust_remote_code=False))
    return 1 << 30 if longest is None else longest


def longest_text(config: Any) -> int | None:
    """The longest sequence of which a model of this configuration says the same alone and in a batch, in tokens.

    LongRoPE's positions of all sequences of a batch change where its longest is longer than the model first was
    trained for (transformers 5.23), so that the context ends there. None where the configuration names no end.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    limits = [getattr(text, "max_position_embeddings", None)]
    for part in (rope, *rope.values()):
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            first = part.get("original_max_position_embeddings")
            limits.append(first or getattr(text, "original_max_position_embeddings", None))
    return min((int(limit) for limit in limits if limit), default=None)


def leave_out_overlong(parsed: Parsed, limits: Limits) -> Parsed:
    """Leave out the comparisons that are too long, and count them. Counts replies that were cut, before that."""
    kept, named, lengths, known = [], list[str](), list[int](), 0
    for comparison in parsed.comparisons:
        prompt, *replies = comparison.num_tokens
        cut = (comparison.chosen_cut, comparison.rejected_cut)
        known += sum(cut)
        lengths += [number - 1 for number, short in zip(replies, cut, strict=True) if not short]
        if limits.allow(prompt, max(replies)):
            kept.append(comparison)
        elif len(named) < NUM_SHOWN:
            where = f"{comparison.where}, pair {comparison.id!r}".removeprefix(", ")
            named.append(f"{where}: prompt {prompt} tokens, longer response {max(replies)} tokens")
    number, length = suspected(lengths, limits.response)
    return dataclasses.replace(
        parsed,
        comparisons=kept,
        skipped={**parsed.skipped, OVERLONG: len(parsed.comparisons) - len(kept)},
        cut={"known": known, "suspected": number, "of_tokens": length} if known or number else {},
        overlong=named,
    )


def check_overlong(parsed: Parsed, limits: Limits, *, objective: str, overlong: Overlong) -> None:
    """Raise DataError, with the first of them, if comparisons were too long and "error" says that none may be.

    None may be either where no comparison is left.
    """
    number = parsed.skipped[OVERLONG]
    if number and (overlong == "error" or not parsed.comparisons):
        raise DataError(
            named_overlong(
                f"objective {objective!r}: {number} of {number + len(parsed.comparisons)} pairs are longer than "
                f"{limits}. Raise the limits, use a model with a longer context, or set data.overlong: drop.",
                parsed.overlong,
                number,
            )
        )


def named_overlong(text: str, named: Sequence[str], number: int) -> str:
    """A message with the first rows that are too long, of `number`."""
    more = [f"… and {number - len(named)} more"] if number > len(named) else []
    return "\n".join([text, *(f"  {line}" for line in (*named, *more))])
