"""A number with its interval, and how it is written for a reader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_ray.maths.bounded_means import BoundedMeans, Difference, mean_bounds, minimum_bounds
from mpo_ray.maths.statistics import interval

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts with its interval.

    No interval where the value holds by definition, and for a mean without bounds where all prompts have one value: of
    its spread nothing is known.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def over(cls, value: float, draws: Floats, confidence: float) -> Estimate:
        """The value, and the percentile interval of its draws (D,); none where all draws are equal."""
        return cls(float(value), *(interval(draws, confidence) if np.ptp(draws) > 0.0 else ()))

    @classmethod
    def of_each(cls, means: BoundedMeans, confidence: float) -> list[Estimate]:
        """The means of values in [0, 1], each with its interval."""
        bounds = mean_bounds(means, confidence)
        return [
            cls(float(value), float(low), float(high)) for value, (low, high) in zip(means.mean, bounds, strict=True)
        ]

    @classmethod
    def of_minimum(cls, means: BoundedMeans, confidence: float) -> Estimate:
        """The worst objective's mean with its interval."""
        return cls(float(means.mean.min()), *minimum_bounds(means, confidence))

    @classmethod
    def of_difference(cls, difference: Difference) -> Estimate:
        return cls(difference.value, difference.low, difference.high)

    @property
    def holds_zero(self) -> bool:
        """Whether the interval holds 0."""
        return self.low is not None and self.high is not None and self.low <= 0.0 <= self.high


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
