"""A number with its bootstrap interval, and how it is written for a reader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_ray.maths.statistics import interval

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts with its bootstrap interval; no interval where the value holds by definition."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def over(cls, value: float, draws: Floats, confidence: float) -> Estimate:
        """The value, and the percentile interval of its draws (D,)."""
        return cls(float(value), *interval(draws, confidence))

    @property
    def half_width(self) -> float:
        """Half of the interval's width; 0 without an interval."""
        return 0.0 if self.low is None or self.high is None else (self.high - self.low) / 2.0


def estimates_from_json(values: Mapping[str, Any]) -> dict[str, Estimate]:
    """Named estimates as `dataclasses.asdict` wrote them."""
    return {name: Estimate(**value) for name, value in values.items()}


def written(estimate: Estimate, digits: int = 2) -> str:
    """The estimate and its interval, as `0.56 [0.52, 0.60]`."""
    if estimate.low is None or estimate.high is None:
        return number(estimate.value, digits)
    return f"{number(estimate.value, digits)} [{number(estimate.low, digits)}, {number(estimate.high, digits)}]"


def number(value: float, digits: int = 2) -> str:
    """The value with fixed digits, and no sign where it rounds to 0."""
    return f"{round(value, digits) + 0.0:.{digits}f}"
