"""Win probabilities and paired bootstrap intervals over prompts (design 2.5).

The prompt is the unit that is resampled: completions of one prompt are not independent of each other. Knows nothing of
tables, candidates or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, lgamma, log

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Most entries of one block of resampling counts, so that many prompts and draws do not fill the memory.
BLOCK = 1 << 22


def win_probabilities(candidate: Floats, reference: Floats) -> Floats:
    """Share of pairs that the candidate wins: W(x) = mean_{i,j} 1[r(x, y_i) > r(x, y'_j)] + ½ 1[=]   (design 2.5)

    candidate: (P, N) rewards of N completions for each of P prompts
    reference: (P, M) rewards of the reference's M completions of the same prompts
    Returns (P,), in [0, 1]; ½ is parity. Unbiased for the win probability of one completion against another.
    """
    _check_rewards(candidate, reference)
    above = candidate[:, :, None] > reference[:, None, :]
    equal = candidate[:, :, None] == reference[:, None, :]
    return np.asarray((above + 0.5 * equal).mean(axis=(1, 2)), dtype=np.float64)


def bootstrap_counts(num_prompts: int, draws: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Resample prompts with replacement: how often each of P prompts is in each draw, n ~ Multinomial(P, 1/P).

    Yields blocks (D, P) whose D sum to `draws`; each row sums to P. The blocks do not depend on their size.
    """
    if num_prompts < 2 or draws < 1:
        raise ValueError(
            f"A bootstrap needs at least 2 prompts and 1 draw; got {num_prompts} prompts and {draws} draws. Evaluate "
            "on more prompts."
        )
    shares = np.full(num_prompts, 1.0 / num_prompts)
    block = max(1, BLOCK // num_prompts)
    for start in range(0, draws, block):
        yield rng.multinomial(num_prompts, shares, size=min(block, draws - start))


def bootstrap_means(values: Floats, draws: int, rng: np.random.Generator) -> Floats:
    """Means of C per-prompt statistics over resampled prompts: x̄*_c = (1/P) Σ_p n_p x_pc

    values: (P, C), one row per prompt
    Returns (draws, C). A draw uses the same prompts for every column, so differences of columns are paired.
    """
    num_prompts = values.shape[0]
    # Centred, so that a column that is constant stays exactly constant over the draws.
    centre = values.mean(axis=0)
    blocks = [counts @ (values - centre) for counts in bootstrap_counts(num_prompts, draws, rng)]
    return np.asarray(centre + np.concatenate(blocks) / num_prompts, dtype=np.float64)


def interval(draws: Floats, confidence: float) -> tuple[float, float]:
    """Percentile interval: the (1 ± confidence)/2 quantiles of the draws (D,).

    Its coverage is nominal as the number of prompts grows; with few prompts it is somewhat too narrow. Of values in
    [0, 1] that are all near an end it is far too narrow: see `bounded_means`.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"A confidence is between 0 and 1, such as 0.95; got {confidence}.")
    low, high = np.quantile(draws, [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class SignTest:
    """On how many prompts a difference is above 0, below, and exactly 0, with the probability of such an excess."""

    above: int
    below: int
    ties: int
    p_value: float


def sign_test(differences: Floats) -> SignTest:
    """Test that a difference is as often above 0 as below: exact, two-sided, ties left out   (design 2.5)

    p = min(1, 2 P(X ≤ min(above, below))),  X ~ Binomial(above + below, ½);  1 where every difference is a tie

    differences: (P,), one per prompt, such as mean rewards of two candidates
    """
    above, below = int((differences > 0).sum()), int((differences < 0).sum())
    p_value = min(1.0, 2.0 * binomial_tail(min(above, below), above + below))
    return SignTest(above, below, len(differences) - above - below, p_value)


def binomial_tail(successes: int, trials: int) -> float:
    """P(X ≤ successes) for X ~ Binomial(trials, ½): Σ_{i ≤ successes} C(trials, i) 2^−trials, added in logarithms."""
    if not 0 <= successes <= trials:
        raise ValueError(f"Successes lie between 0 and the number of trials; got {successes} of {trials}.")
    logs = [lgamma(trials + 1) - lgamma(i + 1) - lgamma(trials - i + 1) for i in range(successes + 1)]
    largest = max(logs)
    return min(1.0, sum(exp(term - largest) for term in logs) * exp(largest - trials * log(2.0)))


def _check_rewards(candidate: Floats, reference: Floats) -> None:
    if candidate.ndim != 2 or reference.ndim != 2 or candidate.shape[0] != reference.shape[0]:
        raise ValueError(
            f"Rewards are (prompts, completions) over the same prompts; got {candidate.shape} and {reference.shape}."
        )
    if candidate.size == 0 or reference.size == 0:
        raise ValueError(f"There is nothing to compare: the shapes are {candidate.shape} and {reference.shape}.")
    if not (np.isfinite(candidate).all() and np.isfinite(reference).all()):
        raise ValueError("Rewards must be finite: NaN and infinity neither win nor lose. Check the reward function.")
