"""What a file was read as, in few enough words to compare."""

from __future__ import annotations

from typing import Any

from mpo_ray.data.comparisons import Parsed


def texts(parsed: Parsed) -> list[tuple[Any, str, str]]:
    return [(c.prompt, c.chosen, c.rejected) for c in parsed.comparisons]


def reasons(parsed: Parsed) -> list[str]:
    return [refusal.reason for refusal in parsed.refused]
