"""Replies that were cut at a limit when they were made: known by their row, or suspected by their lengths.

A reply that is cut does not end where it stops, so its end is not learned: it gets no end token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

#: What servers and libraries call the end of a reply that ran into its limit (OpenAI, vLLM and Ollama; Anthropic;
#: Gemini; transformers; others).
CUT_REASONS = frozenset({"length", "max_tokens", "max_length", "max_new_tokens", "max_output_tokens", "model_length"})
#: Keys that say why a reply ended, those that say whether it was cut, and where either may be kept; without signs.
REASON_KEYS = ("finishreason", "stopreason", "donereason")
TRUNCATED_KEYS = ("truncated", "istruncated")
METADATA_KEYS = ("metadata", "responsemetadata", "generationinfo")
#: A pile of replies of one length is suspicious from so many replies on, this share of all, and so many times as many
#: as have any of the NEAR lengths below.
LEAST, SHARE, TIMES, NEAR = 5, 0.02, 3, 10


def is_cut(values: Mapping[str, Any], column: str) -> bool:
    """Whether a row says that the reply in `column` was cut.

    It says so by a reason (`finish_reason: length`) or by a true `truncated`: as keys of the row, of the reply's last
    message or of the metadata of either, or of the row with the column's name before or behind them
    (`chosen_finish_reason`, `finish_reason_chosen`; for `response_a` also `finish_reason_a`). A key with the column's
    name counts before one without. Keys are compared without underscores and capitals, as Gemini and Bedrock have none.
    """
    reply = values.get(column)
    last = reply[-1] if isinstance(reply, Sequence) and not isinstance(reply, str) and reply else reply
    message, row = _by_key(last), _by_key(values)
    for said in (_own(row, column), message, *_metadata(message), row, *_metadata(row)):
        found = [said[key] for key in TRUNCATED_KEYS if said.get(key) is not None]
        if found:
            return str(found[0]).strip().lower() in ("true", "1", "1.0")
        reasons = [said[key] for key in REASON_KEYS if isinstance(said.get(key), str)]
        reasons += [details["reason"] for details in [_by_key(said.get("incompletedetails"))] if "reason" in details]
        if reasons:
            return any(_plain(str(reason)) in CUT_REASONS for reason in reasons)
    return False


def _by_key(values: Any) -> dict[str, Any]:
    """What a row or a message says by its keys without signs: `finishReason` is `finish_reason`."""
    if not isinstance(values, Mapping):
        return {}
    return {str(key).replace("_", "").replace("-", "").lower(): value for key, value in values.items()}


def _own(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    """What the row says of this column alone. row: by keys without signs"""
    name, short = (text.replace("_", "").lower() for text in (column, column.removeprefix("response_")))
    found: dict[str, Any] = {}
    for key in METADATA_KEYS:
        found |= _by_key(row.get(f"{name}{key}"))
    for key in (*REASON_KEYS, *TRUNCATED_KEYS):
        for place in (f"{key}{short}", f"{short}{key}", f"{key}{name}", f"{name}{key}"):
            if row.get(place) is not None:
                found[key] = row[place]
    return found


def _metadata(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [_by_key(values.get(key)) for key in METADATA_KEYS]


def _plain(reason: str) -> str:
    """A reason without the name of its enumeration, which is there where an enum was written as text."""
    return reason.strip().lower().rpartition(".")[2].replace("-", "_")


def suspected(lengths: Sequence[int], limit: int) -> tuple[int, int]:
    """How many replies are probably cut though nothing says so, and the length that they have; (0, 0) if none.

    lengths: tokens of the replies, without their end; limit: `data.max_response_tokens`

    A limit leaves a pile: suspicious is the longest length that occurs, and the limit, where it has at least 5 replies,
    2 % of all, and 3 times as many as any of the 10 lengths below it.
    """
    counts = Counter(lengths)
    if not counts:
        return 0, 0
    for length in sorted({max(counts), limit}, reverse=True):
        number, near = counts[length], max(counts[length - step] for step in range(1, NEAR + 1))
        if number >= max(LEAST, SHARE * len(lengths), TIMES * near):
            return number, length
    return 0, 0
