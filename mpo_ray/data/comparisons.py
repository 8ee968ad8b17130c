"""Comparisons of one objective: reading them, pairing rated responses, and when bad rows stop a run.

Refuses to know files and hub data sets (`sources`) and what one row says (`row_forms`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from mpo_ray.config_training import Source
from mpo_ray.data.fields import Accept, BadFieldError, Values, accept_all
from mpo_ray.data.labels import BOTH, AmbiguousError, LabelColumn, Meaning, read_labels
from mpo_ray.data.row_forms import (
    FORMS,
    RESPONSE_COLUMNS,
    TIES,
    Pair,
    Rated,
    find_form,
    labelled_reader,
    pair_reader,
    rated_reader,
    response_columns,
)
from mpo_ray.data.sources import DataError, Refusal, Row, describe, read_table
from mpo_ray.records import Comparison, Prompt, Reply, digest, encode_prompt, encode_reply, turns_of

#: Besides ties and missing labels, what the form `ratings` skips: a response with no other left to be paired with.
UNPAIRED = "unpaired responses"
#: What to do where labels allow two readings.
REMEDY = "Say under the objective what each label means, such as `label_means: {0: first, 1: second, 2: tie}`."
#: How many bad rows, and how many reasons with their counts, an error shows.
NUM_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a source says about one objective. Every row is accounted for:

    num_rows = comparisons + refused + skipped, where a comparison of the form `ratings` counts for its two rows.
    cut: how many replies were cut, `known` and `suspected`, and of how many tokens those are (`cuts`)
    overlong: the first comparisons that were left out as too long, each with its place and lengths
    """

    comparisons: list[Comparison]
    refused: list[Refusal]
    skipped: dict[str, int]
    form: str
    num_rows: int
    reading: Told | None = None
    cut: dict[str, int] = field(default_factory=dict)
    overlong: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Told:
    """How the label or rating column of an objective was read, for a person to agree with.

    column: as the file names it; rule: in words; means: each label → the response's column, `a tie` or `no label`;
    example: the first comparison in words, empty where there is none
    """

    column: str
    rule: str
    means: dict[str, str]
    example: str

    def as_text(self, objective: str) -> str:
        meanings = ", ".join(f"{label} → {meaning}" for label, meaning in self.means.items())
        rule = f"{self.rule}: {meanings}" if meanings else self.rule
        example = f"\n  for example {self.example}" if self.example else ""
        return f"{objective} is read from the column {self.column!r}; {rule}.{example}"


def read_comparisons(
    source: Source,
    objective: str,
    label: str | None = None,
    label_means: Mapping[str, Meaning] | None = None,
    *,
    accept: Accept = accept_all,
) -> Parsed:
    """Read what a source says about `objective`; `label` names its label or rating column, by default `objective`.

    label_means: what labels mean, where the column does not say it
    accept: looks at the prompt and the replies of every row (`Rendering.rendered`)
    Raises DataError if the rows fit no form, none has the label column, or its labels allow two readings. Bad rows are
    returned, not raised.
    """
    columns, rows = read_table(source)
    form = find_form(columns, source, label)
    column = label or objective
    tally = _Tally(accept)
    told = None
    if form == "ratings":
        comparisons, told = _read_ratings(source, rows, column, tally)
    elif form == "labels":
        comparisons, told = _read_labels(source, list(rows), columns, column, label_means, tally)
    else:
        comparisons = _with_ids(pair for _, pair in tally.read(rows, pair_reader(form)))
    if form in ("labels", "ratings") and column not in tally.columns:
        raise DataError(
            f"{describe(source)}: the form is {FORMS[form]!r}, but no row has the column {column!r} for objective "
            f"{objective!r}; the columns are {', '.join(tally.columns)}. Set the objective's `label:` to one of them."
        )
    return Parsed(comparisons, tally.refused, dict(tally.skipped), form, tally.num_rows, told)


def _read_labels(
    source: Source,
    rows: Sequence[Row | Refusal],
    columns: list[str],
    column: str,
    label_means: Mapping[str, Meaning] | None,
    tally: _Tally,
) -> tuple[list[Comparison], Told]:
    """All labels are looked at before one is read, as they together say what each of them means."""
    own = {new: old for old, new in source.rename.items()}
    names = response_columns(columns) or RESPONSE_COLUMNS[0]
    described = LabelColumn(
        name=own.get(column, column),
        responses=(own.get(names[0], names[0]), own.get(names[1], names[1])),
        renamed=names,
        others=[own.get(other, other) for other in columns],
    )
    labels = {row.where: row.values.get(column) for row in rows if isinstance(row, Row)}
    try:
        reading = read_labels(labels.values(), described, label_means)
    except AmbiguousError as error:
        raise AmbiguousError(f"{describe(source)}: {error}. {REMEDY}") from None
    found = list(tally.read(rows, labelled_reader(column, names, reading)))
    comparisons = _with_ids(pair for _, pair in found)
    example = "".join(f"{where}, labelled {labels[where]!r}: {_in_words(comparisons[0])}" for where, _ in found[:1])
    said = {"tie": "a tie", "missing": "no label"}
    said |= {meaning: f"{name} is preferred" for meaning, name in zip(BOTH, described.responses, strict=True)}
    means = {label: said[meaning] for label, meaning in sorted(reading.means.items())}
    return comparisons, Told(described.name, reading.rule, means, example)


def _read_ratings(
    source: Source, rows: Iterable[Row | Refusal], column: str, tally: _Tally
) -> tuple[list[Comparison], Told]:
    own = {new: old for old, new in source.rename.items()}.get(column, column)
    is_rank = own.lower().endswith(("rank", "ranking"))
    comparisons = _pair_by_rating(tally.read(rows, rated_reader(column, is_rank=is_rank)), tally)
    rule = "the lower rank is the better one" if is_rank else "the higher number is the better one"
    return comparisons, Told(own, rule, {}, _in_words(comparisons[0]) if comparisons else "")


def _in_words(comparison: Comparison) -> str:
    prompt, chosen, rejected = map(_excerpt, (comparison.prompt, comparison.chosen, comparison.rejected))
    return f"after {prompt}, {chosen} is preferred to {rejected}"


def _excerpt(said: Prompt | Reply, width: int = 60) -> str:
    """The beginning of a text, of a message, or of the last message of a chat, in quotes."""
    _, text = turns_of((said,) if isinstance(said, Mapping) else said)[-1]
    shown = " ".join(text.split())
    return json.dumps(shown if len(shown) <= width else shown[: width - 1] + "…", ensure_ascii=False)


def check_refused(parsed: Parsed, *, objective: str, allow: float) -> None:
    """Raise DataError if more than the share `allow` of the rows was refused, or if no comparison is left."""
    check_share(parsed.refused, parsed.num_rows, what=f"objective {objective!r}", allow=allow)
    if not parsed.comparisons:
        skipped = ", ".join(f"{number} {kind}" for kind, number in parsed.skipped.items()) or "none skipped"
        raise DataError(
            f"objective {objective!r}: no pairs are left of {parsed.num_rows} rows ({len(parsed.refused)} refused, "
            f"{skipped}). Without pairs it has nothing to learn from: check its `preferences:` and `label:`, or remove "
            "the objective."
        )


def check_share(
    refused: Sequence[Refusal],
    num_rows: int,
    *,
    what: str,
    allow: float,
    remedy: str = "Correct them, or raise `data.allow_bad_rows` to leave them out.",
) -> None:
    """Raise DataError, with the counts by reason and the first bad rows, if more than `allow` of the rows is refused.

    `what` names in the message what was read.
    """
    share = len(refused) / max(1, num_rows)
    if share <= allow:
        return
    counts = Counter(refusal.reason.partition(":")[0] for refusal in refused)
    lines = [
        f"{what}: {len(refused)} of {num_rows} rows are bad, a share of {share:.2g}; allowed is {allow:g}. {remedy}"
    ]
    lines += [f"  {number} × {reason}" for reason, number in counts.most_common(NUM_SHOWN)]
    if (kinds := len(counts) - NUM_SHOWN) > 0:
        lines.append(f"  … and {kinds} other reasons")
    lines += [f"  {refusal.where}: {refusal.reason}" for refusal in refused[:NUM_SHOWN]]
    if (more := len(refused) - NUM_SHOWN) > 0:
        lines.append(f"  … and {more} more")
    raise DataError("\n".join(lines))


Item = TypeVar("Item", Pair, Rated)


@dataclass
class _Tally:
    """Counts every row once, as read, refused or skipped."""

    accept: Accept
    refused: list[Refusal] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    num_rows: int = 0
    columns: dict[str, None] = field(default_factory=dict)

    def read(self, rows: Iterable[Row | Refusal], read: Callable[[Values], Item | str]) -> Iterator[tuple[str, Item]]:
        """What `read` makes of each row, with its place; a str is the reason to skip the row."""
        places: dict[str, str] = {}
        for row in rows:
            self.num_rows += 1
            if isinstance(row, Refusal):
                self.refused.append(row)
                continue
            self.columns.update(dict.fromkeys(row.values))
            try:
                item = read(row.values)
                item = item if isinstance(item, str) else _accepted(item, self.accept)
            except BadFieldError as error:
                self.refused.append(Refusal(row.where, str(error)))
                continue
            if isinstance(item, str):
                self.skipped[item] += 1
            elif item.id is not None and item.id in places:
                self.refused.append(Refusal(row.where, f"duplicate id: {item.id!r} is the id of {places[item.id]} too"))
            else:
                if item.id is not None:
                    places[item.id] = row.where
                yield row.where, replace(item, where=row.where)


def _accepted(item: Item, accept: Accept) -> Item:
    if isinstance(item, Pair):
        found = accept(item.prompt, item.chosen, item.rejected, cut=(item.chosen_cut, item.rejected_cut))
        (chosen, rejected), (first, second) = found.replies, map(len, found.reply_ids)
        lengths = (len(found.prompt_ids), first, second)
        return replace(item, prompt=found.prompt, chosen=chosen, rejected=rejected, num_tokens=lengths)
    found = accept(item.prompt, item.response, cut=(item.is_cut,))
    num_tokens = (len(found.prompt_ids), len(found.reply_ids[0]))
    return replace(item, prompt=found.prompt, response=found.replies[0], num_tokens=num_tokens)


def _with_ids(pairs: Iterable[Pair]) -> list[Comparison]:
    """Comparisons in the order of the rows; one without an id is named by its content."""
    repeats: Counter[str] = Counter()
    comparisons = []
    for pair in pairs:
        name = pair.id
        if name is None:
            content = digest([*encode_prompt(pair.prompt), pair.chosen, pair.rejected])[:16]
            name = content if not repeats[content] else f"{content}-{repeats[content]}"
            repeats[content] += 1
        judged = (pair.prompt, pair.chosen, pair.rejected, pair.weight, pair.margin)
        comparisons.append(Comparison(name, *judged, pair.chosen_cut, pair.rejected_cut, pair.num_tokens, pair.where))
    return comparisons


def _pair_by_rating(rated: Iterable[tuple[str, Rated]], tally: _Tally) -> list[Comparison]:
    """Pair each prompt's responses by rank: highest with lowest, second highest with second lowest, and so on.

    A response is in one pair at most: as all pairs, the best one would be chosen in each that it enters (design 2.4,
    trap 4). A pair of equal ratings is a tie, the middle one of an odd number is left over. The margin is the
    difference of the ratings, the weight the mean of the two.
    """
    by_prompt: dict[tuple[str, bool], dict[str, Rated]] = {}
    for where, item in rated:
        responses = by_prompt.setdefault(encode_prompt(item.prompt), {})
        text = encode_reply(item.response)[0]
        if text in responses:
            tally.refused.append(Refusal(where, "the same response to the same prompt came before"))
        else:
            responses[text] = item
    pairs = []
    for responses in by_prompt.values():
        ranked = sorted(responses.values(), key=lambda item: (item.rating, encode_reply(item.response)[0]))
        if len(ranked) % 2:
            tally.skipped[UNPAIRED] += 1
        for worse, better in zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False):
            if better.rating == worse.rating:
                tally.skipped[TIES] += 2
                continue
            name = None if better.id is None or worse.id is None else f"{better.id}/{worse.id}"
            weight, margin = (better.weight + worse.weight) / 2, better.rating - worse.rating
            told = (better.is_cut, worse.is_cut, (*better.num_tokens, worse.num_tokens[1]))
            where = f"{better.where} and {worse.where}"
            pairs.append(Pair(better.prompt, better.response, worse.response, weight, margin, name, *told, where))
    return _with_ids(pairs)
