"""How long rows may be: what the config and the model's context allow, and what happens to longer ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from transformers import AutoConfig

from mpo_ray.data.comparisons import Parsed
from mpo_ray.data.cuts import suspected
from mpo_ray.data.rendering import Rendering
from mpo_ray.data.sources import DataError

OVERLONG = "overlong"


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


def check_lengths(
    parsed: Parsed, rendering: Rendering, limits: Limits, *, objective: str, overlong: Literal["error", "drop"]
) -> Parsed:
    """Leave out the comparisons that are too long, and count them; with "error", raise DataError if there are any.

    Replies that were cut are counted as well, before any is left out.
    """
    kept, first, lengths, known = [], "", list[int](), 0
    for comparison in parsed.comparisons:
        cut = (comparison.chosen_cut, comparison.rejected_cut)
        replies = zip((comparison.chosen, comparison.rejected), cut, strict=True)
        both = [rendering.ids(comparison.prompt, reply, finished=not short) for reply, short in replies]
        prompt, response = len(both[0][0]), max(len(ids) for _, ids in both)
        known += sum(cut)
        lengths += [len(ids) - 1 for (_, ids), short in zip(both, cut, strict=True) if not short]
        if limits.allow(prompt, response):
            kept.append(comparison)
        elif not first:
            first = f"pair {comparison.id!r}: prompt {prompt} tokens, longer response {response} tokens"
    num_overlong = len(parsed.comparisons) - len(kept)
    if num_overlong and (overlong == "error" or not kept):
        raise DataError(
            f"objective {objective!r}: {num_overlong} of {len(parsed.comparisons)} pairs are longer than {limits}; "
            f"first {first}. Raise the limits, use a model with a longer context, or set data.overlong: drop."
        )
    number, length = suspected(lengths, limits.response)
    cut_replies = {"known": known, "suspected": number, "of_tokens": length} if known or number else {}
    return dataclasses.replace(
        parsed, comparisons=kept, skipped={**parsed.skipped, OVERLONG: num_overlong}, cut=cut_replies
    )
