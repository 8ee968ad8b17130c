"""What a label column says: which of the two responses each of its values prefers, and by which rule.

The names of the columns in the file and the values themselves decide. Where they allow two readings, neither is taken:
the wrong one would turn every preference round in silence.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from mpo_ray.data.fields import is_missing
from mpo_ray.data.files import DataError

Meaning = Literal["first", "second", "tie", "missing"]

BOTH: tuple[Meaning, Meaning] = ("first", "second")
WORDS: Mapping[str, Meaning] = {
    "a": "first",
    "first": "first",
    "b": "second",
    "second": "second",
    **dict.fromkeys(("tie", "tied", "draw", "equal", "same", "both", "neither"), "tie"),
    **dict.fromkeys(("tie (bothbad)", "tie (both bad)", "both bad", "bothbad", "no preference"), "tie"),
}
#: What the responses of a comparison are called in labels such as `model_a`, `Response 2` and `assistant B`.
NOUNS = "response|model|assistant|answer|completion|output|option|candidate|reply|text|choice|summary"
#: The last word of a column that holds the number of a response (`better_response_id`).
OF_NUMBERS = ("id", "ids", "index", "idx", "number", "num", "no")
#: Columns that may hold the number of the response that won, or whether the first one did. Where the responses'
#: columns are numbered as well, those of the first kind hold the number.
OF_WINNERS = ("winner", "chosen", "choice", "selected", "preferred")
OF_PREFERENCE = ("better", "best", "preference", "preferences")
#: Columns that name the response that lost.
OF_LOSERS = ("worse", "worst", "rejected", "loser", "losing")


@dataclass(frozen=True, slots=True)
class Reading:
    """column: as the file names it; means: each value in lower case, numbers without a fraction; rule: in words."""

    column: str
    means: Mapping[str, Meaning]
    rule: str

    def of(self, label: object) -> Meaning | None:
        """What a label means; None if the column's reading does not know it."""
        return "missing" if is_missing(label) else self.means.get(word(label))


@dataclass(frozen=True, slots=True)
class LabelColumn:
    """A label column and its surroundings, every name as the file has it.

    responses: the two responses' columns, the first one first; renamed: what `rename:` calls them; others: all columns
    """

    name: str
    responses: tuple[str, str]
    renamed: tuple[str, str]
    others: Collection[str]

    @property
    def words(self) -> list[str]:
        return _split(self.name)

    def numbers(self) -> tuple[int, int] | None:
        """The numbers in the responses' names, None where these have none."""
        first, second = (re.search(r"\d+$", name) for name in self.responses)
        return None if first is None or second is None else (int(first[0]), int(second[0]))


class AmbiguousError(DataError):
    """A label column allows two readings. The message has both."""


def read_labels(labels: Iterable[object], column: LabelColumn, given: Mapping[str, Meaning] | None = None) -> Reading:
    """Find out what each of the labels means; one that is unknown is left out.

    given: what the run file says of them; then nothing else counts. Raises AmbiguousError.
    """
    if given is not None:
        return Reading(column.name, {word(label): meaning for label, meaning in given.items()}, "`label_means` says so")
    values = {word(label): label for label in labels if not is_missing(label)}
    if lost := next((part for part in column.words if part in OF_LOSERS), None):
        raise AmbiguousError(
            f"the column {column.name!r} may name the response that lost ({lost!r}) or, as label columns otherwise do, "
            "the one that won"
        )
    numbers = {text: number for text in values if (number := _number(text)) is not None}
    texts = set(values) - set(numbers)
    means = _texts(texts, column)
    if not numbers:
        return Reading(column.name, means, "the label names the response that is preferred")
    found, rule = _numbers(numbers, column)
    return Reading(column.name, {**found, **means}, rule)


def word(label: object) -> str:
    """A label in the form in which labels are compared: `1` for 1, 1.0, "1" and "1.0"; `true` for True and "TRUE"."""
    text = " ".join(str(label).split()).lower()
    number = None if isinstance(label, bool) else _number(text)
    return text if number is None else f"{number:g}"


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"[+-]?\d+(\.\d*)?", text) else None


def _split(name: str) -> list[str]:
    """The words of a column's name: better, response, id for better_response_id and betterResponseId."""
    return re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())


# ---- texts -----------------------------------------------------------------------------------------------------


def _texts(texts: set[str], column: LabelColumn) -> dict[str, Meaning]:
    named = {
        name.lower(): meaning
        for names in (column.renamed, column.responses)  # where both have a name, the file's own counts
        for name, meaning in zip(names, BOTH, strict=True)
    }
    means: dict[str, Meaning] = {}
    counted: dict[str, int] = {}
    for text in texts:
        match = re.fullmatch(rf"(?:the )?(?:{NOUNS})[ _-]?([ab]|\d)", text)
        if text in named:
            means[text] = named[text]
        elif text in ("true", "false"):
            _speaks_of_first(column)
            means[text] = BOTH[text == "false"]
        elif match and match[1].isdigit():
            counted[text] = int(match[1])
        elif (ending := match[1] if match else text) in WORDS:
            means[text] = WORDS[ending]
    places = _places(set(counted.values()), column)
    return means | {text: places[number] for text, number in counted.items() if number in places}


def _places(numbers: set[int], column: LabelColumn) -> dict[int, Meaning]:
    """Which response each number names: as the columns are numbered, else counted from 0 or from 1."""
    own = column.numbers()
    possible = [(0, 1), (1, 2)] if own is None else [own]
    fitting = [both for both in possible if {number for number in numbers if number >= 0} <= set(both)]
    if numbers and len(fitting) != 1:
        seen = ", ".join(map(str, sorted(numbers)[:5]))
        raise AmbiguousError(
            f"the column {column.name!r} holds the number of the preferred response ({seen}), which may be counted "
            f"from 0 or from 1, and the responses are {column.responses[0]!r} and {column.responses[1]!r}"
        )
    return {number: meaning for both in fitting[:1] for number, meaning in zip(both, BOTH, strict=True)}


# ---- numbers ---------------------------------------------------------------------------------------------------


def _numbers(numbers: Mapping[str, float], column: LabelColumn) -> tuple[dict[str, Meaning], str]:
    """What each number means, and the rule."""
    seen, own, words = set(numbers.values()), column.numbers(), column.words
    fits = own is not None and seen <= set(own)
    if (words[-1:] and words[-1] in OF_NUMBERS) or (fits and (own == (1, 2) or _any_of(OF_WINNERS, words))):
        # Of response_1 and response_2, 1 is the first one whether it is a number or means that the first one won.
        places = _places({int(number) for number in seen if number == int(number)}, column)
        found = {text: places[int(n)] for text, n in numbers.items() if n == int(n) and int(n) in places}
        return found, "the number is that of the response that is preferred"
    if _speaks_of_first(column):
        pass
    elif fits:
        raise AmbiguousError(
            f"in the column {column.name!r} the number {own[0]} may mean that {column.responses[0]!r} is preferred, as "  # type: ignore[index]
            "it is the number in that name, or that the first response is not, as 0 otherwise means"
        )
    elif _any_of(OF_WINNERS + OF_PREFERENCE, words):
        raise AmbiguousError(
            f"in the column {column.name!r} the number 1 may mean that the first response is preferred or, as the "
            "number of a response counted from 0, that the second is"
        )
    if odd := sorted(seen & {-1.0, 2.0}):
        raise AmbiguousError(
            f"the column {column.name!r} holds {', '.join(f'{n:g}' for n in sorted(seen)[:5])}, where {odd[0]:g} may "
            "mean that the second response is preferred, or a tie, or no label, and so may 0"
        )
    by_rule: dict[float, Meaning] = {1.0: "first", 0.0: "second", 0.5: "tie"}
    return {text: by_rule[n] for text, n in numbers.items() if n in by_rule}, "1 means the first response, 0 the second"


def _any_of(known: Iterable[str], words: list[str]) -> bool:
    return any(word in known for word in words)


def _speaks_of_first(column: LabelColumn) -> bool:
    """Whether the name of a column says that it is true where the first response is preferred (`a_is_better`).

    Raises AmbiguousError where it speaks of the second response, or, as a column of a pair, of one response alone.
    """
    first, second = (_split(name) for name in column.responses)
    words = column.words
    spoken = [name for at in range(len(words)) for name in (first, second) if _mentions(words, at, name)]
    if not spoken:
        return False
    twin = [{first[-1]: second[-1], second[-1]: first[-1]}.get(word, word) for word in words]
    if any(_split(other) == twin for other in column.others):
        raise AmbiguousError(
            f"the column {column.name!r} may say which response is preferred or, as another column speaks of the other "
            "response, something of this one alone"
        )
    if spoken[0] == second:
        raise AmbiguousError(
            f"in the column {column.name!r} 1 or true may mean that {column.responses[1]!r} is preferred, as the name "
            "says, or that the first response is, as otherwise"
        )
    return True


def _mentions(words: list[str], at: int, response: list[str]) -> bool:
    """Whether a response's name stands at a place: whole, or only its letter (`b` for response_b)."""
    whole = bool(response) and words[at : at + len(response)] == response
    return whole or (response[-1:] in (["a"], ["b"]) and words[at] == response[-1])
