"""The row forms of preferences (design 5.1): which one a table has, and what one of its rows says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mpo_ray.config_training import Source
from mpo_ray.data.cuts import is_cut
from mpo_ray.data.fields import (
    BadFieldError,
    Values,
    read_id,
    read_number,
    read_prompt,
    read_reply,
    read_transcripts,
)
from mpo_ray.data.labels import Reading
from mpo_ray.data.sources import DataError, describe
from mpo_ray.records import Prompt, Reply

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
    chosen: Reply
    rejected: Reply
    weight: float
    margin: float | None
    id: str | None
    chosen_cut: bool = False
    rejected_cut: bool = False
    num_tokens: tuple[int, int, int] = (0, 0, 0)  # of prompt, chosen and rejected
    where: str = ""


@dataclass(frozen=True, slots=True)
class Rated:
    prompt: Prompt
    response: Reply
    rating: float
    weight: float
    id: str | None
    is_cut: bool = False
    num_tokens: tuple[int, int] = (0, 0)  # of prompt and response
    where: str = ""


def find_form(columns: list[str], source: Source, label: str | None) -> str:
    """The first form, in the order of FORMS, whose columns are there; a given `label` leaves those that read one."""
    has = set(columns).issuperset
    fits = {
        "pairs": has({"prompt", "chosen", "rejected"}),
        "transcripts": has({"chosen", "rejected"}),
        "labels": has({"prompt"}) and response_columns(columns) is not None,
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


def pair_reader(form: str) -> Callable[[Values], Pair | str]:
    """How to read a row of the form `pairs` or `transcripts`. Raises BadFieldError for a bad row."""
    return _read_pair if form == "pairs" else _read_transcript_pair


def labelled_reader(column: str, names: tuple[str, str], reading: Reading) -> Callable[[Values], Pair | str]:
    """How to read a row of the form `labels`: the pair, or the reason to skip the row. Raises BadFieldError.

    column, names: of the labels and of the two responses, as they are after `rename:`
    """
    return partial(_read_labelled, column, names, reading)


def rated_reader(column: str, *, is_rank: bool) -> Callable[[Values], Rated | str]:
    """How to read a row of the form `ratings`, as `labelled_reader`. Of ranks the lowest is the best."""
    return partial(_read_rated, column, -1.0 if is_rank else 1.0)


def response_columns(columns: list[str]) -> tuple[str, str] | None:
    return next((pair for pair in RESPONSE_COLUMNS if set(pair) <= set(columns)), None)


def _make_pair(
    prompt: Prompt, chosen: Reply, rejected: Reply, values: Values, names: tuple[str, str] = ("chosen", "rejected")
) -> Pair:
    """names: of the columns of both replies"""
    if chosen == rejected:
        raise BadFieldError("chosen is equal to rejected")
    margin = read_number(values, "margin")
    if margin is not None and margin < 0:
        raise BadFieldError(f"margin is negative: {margin:g}, and it says how much better chosen is")
    first, second = (is_cut(values, name) for name in names)
    return Pair(prompt, chosen, rejected, _read_weight(values), margin, read_id(values), first, second)


def _read_weight(values: Values) -> float:
    weight = read_number(values, "weight")
    if weight is not None and weight <= 0:
        raise BadFieldError(f"weight is not positive: {weight:g}")
    return 1.0 if weight is None else weight


def _read_pair(values: Values) -> Pair:
    return _make_pair(*_read_replies(values, "chosen", "rejected"), values)


def _read_replies(values: Values, chosen: str, rejected: str) -> tuple[Prompt, Reply, Reply]:
    prompt = read_prompt(values)
    prompt_of_chosen, chosen_reply = read_reply(values, chosen, prompt)
    prompt_of_rejected, rejected_reply = read_reply(values, rejected, prompt)
    if prompt_of_chosen != prompt_of_rejected:
        raise BadFieldError(f"fields {chosen!r} and {rejected!r} repeat different prompts")
    return prompt_of_chosen, chosen_reply, rejected_reply


def _read_transcript_pair(values: Values) -> Pair:
    return _make_pair(*read_transcripts(values), values)


def _read_labelled(column: str, names: tuple[str, str], reading: Reading, values: Values) -> Pair | str:
    """The pair in the order that the label says."""
    label = values.get(column)
    meaning = reading.of(label)
    if meaning is None:
        raise BadFieldError(
            f"unknown label: {label!r} in column {column!r}; known are 1, 0, 0.5, a, b, tie, true, false and the names "
            "of the responses, unless `label_means:` says what labels mean"
        )
    if meaning == "missing":
        return MISSING
    if meaning == "tie":
        return TIES
    chosen, rejected = names if meaning == "first" else names[::-1]
    return _make_pair(*_read_replies(values, chosen, rejected), values, (chosen, rejected))


def _read_rated(column: str, sign: float, values: Values) -> Rated | str:
    rating = read_number(values, column)
    if rating is None:
        return MISSING
    prompt, response = read_reply(values, "response", read_prompt(values))
    cut = is_cut(values, "response")
    return Rated(prompt, response, sign * rating, _read_weight(values), read_id(values), cut)
