"""Replies that were cut at a limit when they were made: known by their row, or suspected by their lengths.

A reply that is cut does not end where it stops, so its end is not learned: it gets no end token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

#: What servers call the end of a reply that ran into its limit (OpenAI and vLLM; Anthropic; Gemini; others).
CUT_REASONS = frozenset({"length", "max_tokens", "max_length", "max_output_tokens", "model_length"})
#: Keys that say why a reply ended.
REASON_KEYS = ("finish_reason", "stop_reason")
#: A pile of replies of one length is suspicious from so many replies on, this share of all, and so many times as many
#: as have any of the NEAR lengths below.
LEAST, SHARE, TIMES, NEAR = 5, 0.02, 3, 10


def is_cut(values: Mapping[str, Any], column: str) -> bool:
    """Whether a row says that the reply in `column` was cut.

    It says so by `finish_reason` or `stop_reason` (`length`, `max_tokens`, …) or by a true `truncated`: as keys of the
    row, of the reply's last message, or of the row with the column's name before them (`chosen_finish_reason`). A key
    with the column's name counts before one without.
    """
    reply = values.get(column)
    last = reply[-1] if isinstance(reply, Sequence) and not isinstance(reply, str) and reply else reply
    own = {key: values.get(f"{column}_{key}") for key in (*REASON_KEYS, "truncated")}
    of_message = dict(last) if isinstance(last, Mapping) else {}
    for said in (own, of_message, values):
        reasons = [str(said[key]) for key in REASON_KEYS if isinstance(said.get(key), str)]
        if said.get("truncated") is not None:
            return str(said["truncated"]).strip().lower() in ("true", "1", "1.0")
        if reasons:
            return any(reason.strip().lower() in CUT_REASONS for reason in reasons)
    return False


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
