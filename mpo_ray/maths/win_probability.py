"""The average probability of every candidate to win against the others of its prompt, from rewards or from labels.

Opponents are the other candidates, never the candidate itself: p̄ of m samples of π_ref is then unbiased.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from mpo_ray.maths.simplex import Array

Link = Callable[[Array], Array]


def bradley_terry(difference: Array) -> Array:
    """P(y ≻ y') = σ(r(y) − r(y')): rewards are in log-odds."""
    return np.asarray(expit(difference))


def order(difference: Array) -> Array:
    """1 where r(y) > r(y'), ½ where they are equal: what a win rate counts."""
    return np.asarray(0.5 * (1.0 + np.sign(difference)))


LINKS: dict[str, Link] = {"bradley_terry": bradley_terry, "order": order}


def win_probabilities_in_pool(rewards: Array, starts: NDArray[np.int64], link: Link) -> Array:
    """p̄(y_i) = 1/(m − 1) Σ_{j ≠ i} P(y_i ≻ y_j) for every candidate of every prompt   (design 2.4)

    rewards: (N,), rows of prompt p are starts[p] … starts[p + 1] − 1, at least 2
    Returns (N,); the mean over a prompt is ½ whatever the rewards are.
    """
    found = np.empty(len(rewards))
    for first, last in pairwise(starts):
        own = rewards[first:last]
        wins = link(own[:, None] - own[None, :])
        found[first:last] = (wins.sum(axis=1) - np.diag(wins)) / (last - first - 1)
    return found


def win_probabilities_from_labels(
    winners: NDArray[np.int64], losers: NDArray[np.int64], shares: Array, num_candidates: int
) -> Array:
    """p̄ of every candidate from labelled pairs: the share of its comparisons that it won

    winners, losers: (L,) numbers of the candidates of each pair; shares: (L,) 1, or ½ for a tie
    Returns (num_candidates,), NaN for a candidate that no pair compares.
    """
    won = np.bincount(winners, shares, num_candidates) + np.bincount(losers, 1.0 - shares, num_candidates)
    compared = np.bincount(winners, minlength=num_candidates) + np.bincount(losers, minlength=num_candidates)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(compared > 0, won / np.maximum(compared, 1), np.nan))
