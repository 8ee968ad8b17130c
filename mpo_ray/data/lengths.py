"""How long the rows of a run's tables are, in tokens, and which share of them is too long."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: The share of rows that the second figure of a `Spread` covers.
HIGH = 0.95
_COLUMNS = ("", "rows", "median", "95 %", "longest", "median", "95 %", "longest", "too long")


@dataclass(frozen=True, slots=True)
class Spread:
    """Tokens: at least half of the rows, and at least 95 % of them, have no more than the first two."""

    median: int
    high: int
    longest: int
    mean: float


@dataclass(frozen=True, slots=True)
class TableLengths:
    """One table: its rows of the unit `unit`, those that are too long included, and the share of these.

    reply: of pairs both replies; None where the table has prompts alone
    kept: of the prompts with their longer reply, without rows that are too long; None where none is left
    """

    what: str
    unit: str
    number: int
    prompt: Spread
    reply: Spread | None
    kept: Spread | None
    too_long: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TableLengths:
        spreads = {name: values[name] and Spread(**values[name]) for name in ("prompt", "reply", "kept")}
        return cls(**{**values, **spreads})


def spread(lengths: Sequence[int]) -> Spread:
    """Of at least one length: the smallest that covers half of them, that covers 95 %, the longest, and the mean."""
    ordered = sorted(lengths)
    median, high = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, HIGH))
    return Spread(median, high, ordered[-1], sum(ordered) / len(ordered))


def lengths_table(tables: Sequence[TableLengths]) -> str:
    """The tables of a run below each other, for a terminal of 100 columns."""
    rows = [_COLUMNS, *map(_cells, tables)]
    first = max(len(row[0]) for row in rows)
    widths = [max(len(row[column]) for row in rows) for column in range(1, len(_COLUMNS))]
    lines = [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], widths, strict=True))])
        for row in rows
    ]
    heading = " " * (first + widths[0] + 4) + "prompt tokens".ljust(sum(widths[1:4]) + 6) + "reply tokens"
    return "\n".join(line.rstrip() for line in [heading, *lines])


def _cells(table: TableLengths) -> tuple[str, ...]:
    shown: list[str] = []
    for one in (table.prompt, table.reply):
        shown += ["", "", ""] if one is None else [f"{n:,}" for n in (one.median, one.high, one.longest)]
    return table.what, f"{table.number:,} {table.unit}", *shown, f"{100 * table.too_long:.1f} %"
