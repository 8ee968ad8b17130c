"""Intervals for means of values in [0, 1] over prompts, such as win rates; they also hold where all values are equal.

The method is Gaffke's bound. It is the Bayesian bootstrap (Rubin 1981) with one prompt more, whose value is the worst
that is possible. With (v_1, …, v_P, v_0) ∼ Dirichlet(1, …, 1) a draw is

    low = Σ_p v_p x_p + v_0 · 0,      high = Σ_p v_p x_p + v_0 · 1

and the interval goes from the α/2 quantile of `low` to the 1 − α/2 quantile of `high`. Where every x_p is 0 or 1, this
is the Clopper–Pearson interval: `low` is Beta(s, P − s + 1) for s ones. The prompt is the unit, so several completions
of one prompt, ties as one half, and unequal prompts need no correction. The interval is conservative: it covers at
least as often as it says, a little more often where few prompts are certain.

Sources: Gaffke, "Three test statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative variable"
(Math. Methods of Statistics 14, 2005); Phan, Thomas and Learned-Miller, "Towards practical mean bounds for small
samples" (ICML 2021); Clopper and Pearson (Biometrika 26, 1934). Knows nothing of tables, candidates or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

Floats = NDArray[np.float64]

#: Most entries of one block of weights, so that many prompts and draws do not fill the memory.
BLOCK = 1 << 22
#: Probability of a decision that `prompts_to_decide` asks for, and the largest number that is worth telling.
POWER, PRACTICAL = 0.8, 1_000_000


@dataclass(frozen=True, slots=True, eq=False)
class BoundedMeans:
    """Means of C values, and D draws with one worst and one best prompt added. All columns share the prompts' weights.

    mean: (C,), NaN for a column without values; low, high: (D, C)
    """

    mean: Floats
    low: Floats
    high: Floats

    def columns(self, start: int, stop: int) -> BoundedMeans:
        return BoundedMeans(self.mean[start:stop], self.low[:, start:stop], self.high[:, start:stop])


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference with its interval; `standard_error` is that of the two objectives with the lowest estimates."""

    value: float
    low: float
    high: float
    standard_error: float


def bounded_means(
    values: Floats, draws: int, rng: np.random.Generator, *, read: NDArray[np.bool_] | None = None
) -> BoundedMeans:
    """Draw the means of C columns over P prompts, as the module says.

    values: (P, C) in [0, 1]; read: (P, C) which values there are, all if absent. A mean is over those that there are.
    Raises ValueError for values outside [0, 1], or without prompts or draws.
    """
    present = np.ones(values.shape, dtype=bool) if read is None else read
    num_prompts = len(values)
    if num_prompts < 1 or draws < 1:
        raise ValueError(f"An interval needs prompts and draws; got {num_prompts} prompts and {draws} draws.")
    known = np.where(present, values, 0.0)
    if not ((known >= 0.0) & (known <= 1.0)).all():
        raise ValueError("Values of bounded means lie between 0 and 1; a win probability outside it is no probability.")
    given = present.astype(np.float64)
    sums, totals, spare = [], [], []
    block = max(1, BLOCK // (num_prompts + 1))
    for start in range(0, draws, block):
        weights = rng.standard_exponential((min(block, draws - start), num_prompts + 1))
        sums.append(weights[:, :-1] @ known)
        totals.append(weights[:, :-1] @ given)
        spare.append(weights[:, -1:])
    worst = np.concatenate(spare)
    total = np.concatenate(totals) + worst
    low = np.concatenate(sums) / total
    number = present.sum(axis=0)
    mean = np.where(number > 0, known.sum(axis=0) / np.maximum(number, 1), np.nan)
    return BoundedMeans(mean, low, np.minimum(low + worst / total, 1.0))


def fixed_means(value: float, like: BoundedMeans) -> BoundedMeans:
    """Means that are `value` by definition, beside draws of the same shape."""
    return BoundedMeans(np.full_like(like.mean, value), np.full_like(like.low, value), np.full_like(like.high, value))


def mean_bounds(means: BoundedMeans, confidence: float) -> Floats:
    """(C, 2) the interval of each mean, one at a time."""
    tail = _tail(confidence)
    return np.stack([np.quantile(means.low, tail, axis=0), np.quantile(means.high, 1.0 - tail, axis=0)], axis=1)


def minimum_bounds(means: BoundedMeans, confidence: float) -> tuple[float, float]:
    """Interval of the worst objective's mean, min_k W_k, for C = K columns   (design 2.5)

        low = min_k low_k(α/2),      high = min_k high_k(α/2K)

    The lower end is at most that of the objective that is truly the lowest, so it fails no more often than one end
    does. For the upper end any objective may be the one whose upper end is the lowest: hence α/2K (Bonferroni). The
    quantiles of the minimum inside each draw would be too low for balanced objectives, as minima of estimates are.
    """
    tail = _tail(confidence)
    high = np.quantile(means.high, 1.0 - tail / means.high.shape[1], axis=0)
    return float(np.quantile(means.low, tail, axis=0).min()), float(high.min())


def difference_of_minima(ours: BoundedMeans, theirs: BoundedMeans, confidence: float) -> Difference:
    """min_k W_k(ours) − min_j W_j(theirs) with its paired interval; draws of the same prompts, K columns each

    The difference is min_k max_j (W_k − W'_j), and so are its ends, of the ends of W_k − W'_j at α/2K:

        low = min_k max_j q_{α/2K}(low_k − high'_j),      high = min_k max_j q_{1 − α/2K}(high_k − low'_j)

    At most K of the pairs can put an end on the wrong side, hence α/2K (Bonferroni).
    """
    size = ours.low.shape[1]
    tail = _tail(confidence) / size
    low, high = np.empty((size, size)), np.empty((size, size))
    for k in range(size):
        low[k] = np.quantile(ours.low[:, [k]] - theirs.high, tail, axis=0)
        high[k] = np.quantile(ours.high[:, [k]] - theirs.low, 1.0 - tail, axis=0)
    worst, other = int(ours.mean.argmin()), int(theirs.mean.argmin())
    return Difference(
        value=float(ours.mean.min() - theirs.mean.min()),
        low=float(low.max(axis=1).min()),
        high=float(high.max(axis=1).min()),
        standard_error=float((ours.low[:, worst] - theirs.low[:, other]).std()),
    )


def prompts_to_decide(found: Difference, *, num_prompts: int, num_objectives: int, confidence: float) -> int | None:
    """How many prompts would tell a difference from 0, if it is as large as its estimate d and its error s/√n:

        n = P ((z_{1 − α/2K} + z_{0.8}) · error / d)²,    error: the paired difference's standard error on P prompts

    With n prompts the interval leaves 0 out with probability 0.8 (the usual sample size for two means). None where the
    interval leaves it out already, where d is 0, and where n is over a million. At least P + 1.
    """
    if found.low > 0.0 or found.high < 0.0 or found.value == 0.0:
        return None
    z = norm.ppf(1.0 - _tail(confidence) / num_objectives) + norm.ppf(POWER)
    needed = num_prompts * (z * found.standard_error / found.value) ** 2
    return max(int(np.ceil(needed)), num_prompts + 1) if needed <= PRACTICAL else None


def _tail(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"A confidence is between 0 and 1, such as 0.95; got {confidence}.")
    return (1.0 - confidence) / 2.0
