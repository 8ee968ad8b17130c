"""The row forms of preferences (design 5.1): which one a table has, and what one of its rows says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mpo_ray.config_training import Source
from mpo_ray.data.fields import (
    BadFieldError,
    Values,
    is_missing,
    read_id,
    read_number,
    read_prompt,
    read_reply,
    read_transcripts,
)
from mpo_ray.data.sources import DataError, describe
from mpo_ray.records import Prompt

#: The row forms by name, with their columns, as an error lists them.
FORMS = {
    "pairs": "prompt, chosen, rejected",
    "transcripts": "chosen, rejected (whole transcripts)",
    "labels": "prompt, two responses (a and b, or response_1 and response_2), a label column per objective",
    "ratings": "prompt, response, a rating column per objective",
}
#: What the two responses of the form `labels` may be called; the first pair that is there counts.
RESPONSE_COLUMNS = (
    ("a", "b"),
    ("response_a", "response_b"),
    ("response_1", "response_2"),
    ("response_0", "response_1"),
)
#: Why a sound row says nothing about an objective.
TIES, MISSING = "ties", "missing labels"


@dataclass(frozen=True, slots=True)
class Pair:
    prompt: Prompt
    chosen: str
    rejected: str
    weight: float
    margin: float | None
    id: str | None


@dataclass(frozen=True, slots=True)
class Rated:
    prompt: Prompt
    response: str
    rating: float
    weight: float
    id: str | None


def find_form(columns: list[str], source: Source, label: str | None) -> str:
    """The first form, in the order of FORMS, whose columns are there; a given `label` leaves those that read one."""
    has = set(columns).issuperset
    fits = {
        "pairs": has({"prompt", "chosen", "rejected"}),
        "transcripts": has({"chosen", "rejected"}),
        "labels": has({"prompt"}) and _response_columns(columns) is not None,
        "ratings": has({"prompt", "response"}),
    }
    forms = [form for form, fit in fits.items() if fit and (label is None or form in ("labels", "ratings"))]
    if forms:
        return forms[0]
    known = "\n".join(f"  {name}: {needs}" for name, needs in FORMS.items())
    asked = f" that has a label, and `label:` is {label!r}" if label is not None else ""
    raise DataError(
        f"{describe(source)}: the columns {', '.join(columns)} fit no row form{asked}. Rename columns with `rename:`. "
        f"The forms are\n{known}"
    )


def pair_reader(form: str, columns: list[str], column: str) -> Callable[[Values], Pair | str]:
    """How to read a row of a form other than `ratings`: the pair, or the reason to skip the row.

    `column` holds the labels. Raises BadFieldError for a bad row.
    """
    if form == "labels":
        return partial(_read_labelled, column, _response_columns(columns) or RESPONSE_COLUMNS[0])
    return _read_pair if form == "pairs" else _read_transcript_pair


def rated_reader(column: str) -> Callable[[Values], Rated | str]:
    """How to read a row of the form `ratings`, as `pair_reader`."""
    return partial(_read_rated, column)


def _response_columns(columns: list[str]) -> tuple[str, str] | None:
    return next((pair for pair in RESPONSE_COLUMNS if set(pair) <= set(columns)), None)


def _make_pair(prompt: Prompt, chosen: str, rejected: str, values: Values) -> Pair:
    if chosen == rejected:
        raise BadFieldError("chosen is equal to rejected")
    margin = read_number(values, "margin")
    if margin is not None and margin < 0:
        raise BadFieldError(f"margin is negative: {margin:g}, and it says how much better chosen is")
    return Pair(prompt, chosen, rejected, _read_weight(values), margin, read_id(values))


def _read_weight(values: Values) -> float:
    weight = read_number(values, "weight")
    if weight is not None and weight <= 0:
        raise BadFieldError(f"weight is not positive: {weight:g}")
    return 1.0 if weight is None else weight


def _read_pair(values: Values) -> Pair:
    return _make_pair(*_read_replies(values, "chosen", "rejected"), values)


def _read_replies(values: Values, chosen: str, rejected: str) -> tuple[Prompt, str, str]:
    prompt = read_prompt(values)
    prompt_of_chosen, chosen_reply = read_reply(values, chosen, prompt)
    prompt_of_rejected, rejected_reply = read_reply(values, rejected, prompt)
    if prompt_of_chosen != prompt_of_rejected:
        raise BadFieldError(f"fields {chosen!r} and {rejected!r} repeat different prompts")
    return prompt_of_chosen, chosen_reply, rejected_reply


def _read_transcript_pair(values: Values) -> Pair:
    return _make_pair(*read_transcripts(values), values)


def _read_labelled(column: str, names: tuple[str, str], values: Values) -> Pair | str:
    """The pair in the order that the label says."""
    label = values.get(column)
    if is_missing(label):
        return MISSING
    share = _preference(label, names, holds_index=column.endswith("_id"))
    if share is None:
        raise BadFieldError(
            f"unknown label: {label!r} in column {column!r}; known are 1, 0, 0.5, a, b, tie, true, false"
        )
    if share == 0.5:
        return TIES
    chosen, rejected = names if share == 1.0 else names[::-1]
    return _make_pair(*_read_replies(values, chosen, rejected), values)


def _preference(label: object, names: tuple[str, str], *, holds_index: bool) -> float | None:
    """1 if the label prefers the first response, 0 if the second, 0.5 for a tie, None if it says none of these.

    Where the label column holds an index (`better_response_id`), the number is that in the preferred column's name.
    """
    word = str(label).strip().lower()
    if word in names:
        return 1.0 - names.index(word)
    try:
        number = float(word)
    except ValueError:
        return {"a": 1.0, "true": 1.0, "b": 0.0, "false": 0.0, "tie": 0.5}.get(word)
    if holds_index:
        return {name.rpartition("_")[2]: value for name, value in zip(names, (1.0, 0.0), strict=True)}.get(
            f"{number:g}"
        )
    return number if number in (0.0, 0.5, 1.0) else None


def _read_rated(column: str, values: Values) -> Rated | str:
    rating = read_number(values, column)
    if rating is None:
        return MISSING
    prompt, response = read_reply(values, "response", read_prompt(values))
    return Rated(prompt, response, rating, _read_weight(values), read_id(values))
