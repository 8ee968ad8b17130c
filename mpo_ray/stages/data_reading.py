"""Reading the tables of a run: each with its checks, what is told of it, and the lengths of its rows.

What is wrong with one table is kept among the problems, so that the next one is read as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mpo_ray.config_training import Source
from mpo_ray.data.comparisons import Parsed, check_refused, check_share, read_comparisons
from mpo_ray.data.cuts import suspected
from mpo_ray.data.fields import Accept, Rendered, accept_all
from mpo_ray.data.lengths import TableLengths, spread
from mpo_ray.data.limits import (
    NUM_SHOWN,
    Limits,
    check_overlong,
    leave_out_overlong,
    model_context,
    named_overlong,
)
from mpo_ray.data.problems import Problems
from mpo_ray.data.prompts import PlacedPrompt, read_prompt_rows
from mpo_ray.data.rendering import Rendering
from mpo_ray.data.sources import DataError
from mpo_ray.data.texts import ParsedTexts, Text, read_texts
from mpo_ray.policies.loading import load_rendering
from mpo_ray.records import Prompt, Reply, prompt_id
from mpo_ray.stages.stage import Context

#: Where no model says how long a row may be.
ANY_LENGTH = 1 << 30


@dataclass
class Reader:
    """Reads one run's tables. rendered: whether a model was there to render rows; without one they have no lengths."""

    context: Context
    accept: Accept
    limits: Limits
    problems: Problems
    unread: Counter[str]
    rendered: bool
    lengths: list[TableLengths] = field(default_factory=list)

    def comparisons(self, name: str) -> Parsed | None:
        """One objective's comparisons, checked against the rules of its form and the lengths the model can take.

        None where the source cannot be read, or leaves no comparison.
        """
        config = self.context.config
        objective, allow, overlong = config.objectives[name], config.data.allow_bad_rows, config.data.overlong
        found: Parsed | None = None
        with self.problems.kept():
            source = self.context.resolve(objective.preferences)
            read = read_comparisons(source, name, objective.label, objective.label_means, accept=self.accept)
            found = leave_out_overlong(read, self.limits)
        self._tell_unread(f"objective {name!r}")
        if found is None:
            return None
        with self.problems.kept():
            check_refused(read, objective=name, allow=allow)
        with self.problems.kept():
            check_overlong(found, self.limits, objective=name, overlong=overlong)
        kept = [c.num_tokens[0] + max(c.num_tokens[1:]) for c in found.comparisons]
        self._measure(name, "pairs", [c.num_tokens for c in read.comparisons], kept)
        self._tell_cut(f"objective {name!r}", found.cut)
        if config.data.cut_replies == "finished":
            found = replace(
                found, comparisons=[replace(c, chosen_cut=False, rejected_cut=False) for c in found.comparisons]
            )
        return found if found.comparisons else None

    def prompts(self, source: Source, use: str) -> list[PlacedPrompt]:
        """The prompts of a source, each once. Raises DataError."""
        allow = self.context.config.data.allow_bad_rows
        rows = read_prompt_rows(self.context.resolve(source), accept=self.accept, allow=allow)
        self._tell_unread(f"prompts for the {use}")
        return list({prompt_id(row.prompt): row for row in rows}.values())

    def fitting_prompts(self, available: Sequence[PlacedPrompt], use: str, new_tokens: int) -> list[Prompt]:
        """Those that leave room for a completion. Raises DataError for others, unless they may be left out."""
        limits = self.limits
        room = min(limits.prompt, limits.context - new_tokens)
        long = [p for p in available if p.num_tokens > room]
        kept = [p.num_tokens for p in available if p.num_tokens <= room]
        self._measure(f"prompts for the {use}", "prompts", [(p.num_tokens,) for p in available], kept)
        if long and self.context.config.data.overlong == "error":
            text = (
                f"prompts for the {use}: {len(long)} of {len(available)} are longer than {room} tokens, which is what "
                f"max_prompt_tokens {limits.prompt} and the model's context {limits.context} leave beside {new_tokens} "
                "new tokens. Lower max_new_tokens, raise max_prompt_tokens, or set data.overlong: drop."
            )
            raise DataError(
                named_overlong(text, [f"{p.where}: {p.num_tokens} tokens" for p in long[:NUM_SHOWN]], len(long))
            )
        fitting = [p.prompt for p in available if p.num_tokens <= room]
        if not fitting:
            raise DataError(f"prompts for the {use}: none of {len(available)} can be used; give `{use}` prompts.")
        return fitting

    def texts(self) -> tuple[ParsedTexts, list[Text], dict[str, Any]]:
        """The texts of `reference.sft.source`, those that are not too long, and what the stage's counts say of them.

        Raises DataError where the source cannot be read.
        """
        config = self.context.config
        sft, what = config.reference.sft, "reference.sft.source"
        assert sft is not None
        parsed = read_texts(self.context.resolve(sft.source), accept=self.accept)
        self._tell_unread(what)
        with self.problems.kept():
            check_share(parsed.refused, parsed.num_rows, what=what, allow=config.data.allow_bad_rows)
        sizes = [(len(text.prompt_ids), len(text.response_ids)) for text in parsed.texts]
        fits = [self.limits.allow(*size) for size in sizes]
        fitting = [text for text, fit in zip(parsed.texts, fits, strict=True) if fit]
        overlong = len(parsed.texts) - len(fitting)
        kept = [sum(one) for one, fit in zip(sizes, fits, strict=True) if fit]
        self._measure("texts for SFT", "texts", sizes, kept)
        if overlong and config.data.overlong == "error":
            with self.problems.kept():
                raise DataError(self._overlong_texts(parsed.texts, fits))
        whole = [n - 1 for text, (_, n) in zip(parsed.texts, sizes, strict=True) if not text.is_cut]
        number, length = suspected(whole, self.limits.response)
        known = sum(text.is_cut for text in parsed.texts)
        cut = {"known": known, "suspected": number, "of_tokens": length} if known or number else {}
        self._tell_cut(what, cut)
        for reason, number in parsed.left_out.items():
            self._say(f"{what}: {number} {reason} are not learned")
        told = {"refused": len(parsed.refused), "overlong": overlong, "left_out": parsed.left_out, "cut": cut}
        return parsed, fitting, told

    def _overlong_texts(self, texts: Sequence[Text], fits: Sequence[bool]) -> str:
        long = [text for text, fit in zip(texts, fits, strict=True) if not fit]
        named = [
            f"{t.where}: prompt {len(t.prompt_ids)} tokens, response {len(t.response_ids)} tokens"
            for t in long[:NUM_SHOWN]
        ]
        text = (
            f"reference.sft.source: {len(long)} of {len(texts)} texts are longer than {self.limits}. Raise the limits, "
            "use a model with a longer context, or set data.overlong: drop."
        )
        return named_overlong(text, named, len(long))

    def _measure(self, what: str, unit: str, rows: Sequence[tuple[int, ...]], kept: Sequence[int]) -> None:
        """rows: tokens of each row's prompt and replies; kept: of a prompt with its longer reply, of rows that fit"""
        if not rows or not self.rendered:
            return
        replies = [reply for _, *both in rows for reply in both]
        self.lengths.append(
            TableLengths(
                what,
                unit,
                len(rows),
                prompt=spread([prompt for prompt, *_ in rows]),
                reply=spread(replies) if replies else None,
                kept=spread(kept) if kept else None,
                too_long=1 - len(kept) / len(rows),
            )
        )

    def _tell_unread(self, what: str) -> None:
        """Say which keys of messages the model will not see."""
        for key, number in sorted(self.unread.items()):
            self._say(f"  {what}: the chat template does not read {key!r} (messages that have it: {number})")
        self.unread.clear()

    def _tell_cut(self, what: str, cut: Mapping[str, int]) -> None:
        """Say how many replies were cut, or are likely to be, and what is learned of them."""
        if not cut:
            return
        unfinished = self.context.config.data.cut_replies == "unfinished"
        learned = "get no end token" if unfinished else "are learned as if they ended there"
        if cut["known"]:
            self._say(
                f"{what}: {cut['known']} replies were cut at a limit, as their rows say, and {learned} "
                "(data.cut_replies)"
            )
        if cut["suspected"]:
            self._say(
                f"{what}: {cut['suspected']} replies have exactly {cut['of_tokens']} tokens: they were probably cut at "
                "a limit, and are learned as if they ended there, as no row says so. Give their rows `finish_reason: "
                "length`, or leave them out"
            )

    def _say(self, text: str) -> None:
        self.context.console.print(text, markup=False, soft_wrap=True)


def open_reader(context: Context, problems: Problems) -> Reader:
    """A reader that renders rows for the run's model, or, where that is a problem, one that reads them all the same."""
    data = context.config.data
    with problems.kept():
        rendering = load_rendering(context.given_model(), **data.rendering)
        limits = Limits(
            prompt=data.max_prompt_tokens,
            response=data.max_response_tokens,
            context=model_context(context.given_model()),
        )
        return Reader(context, _accept(rendering, data.cut_replies), limits, problems, rendering.unread, rendered=True)
    anything = Limits(prompt=ANY_LENGTH, response=ANY_LENGTH, context=ANY_LENGTH)
    return Reader(context, accept_all, anything, problems, Counter(), rendered=False)


def _accept(rendering: Rendering, cut_replies: str) -> Accept:
    """How a row is rendered: replies that were cut without an end token, unless they are learned as finished."""
    if cut_replies == "unfinished":
        return rendering.rendered

    def finished(prompt: Prompt, *replies: Reply, cut: Sequence[bool] = ()) -> Rendered:
        return rendering.rendered(prompt, *replies)

    return finished
