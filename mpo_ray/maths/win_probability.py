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


def win_probabilities_in_pool(
    rewards: Array, starts: NDArray[np.int64], link: Link, log_reference: Array | None = None
) -> tuple[Array, Array]:
    """p̄(y_i) = Σ_{j ≠ i} w_j P(y_i ≻ y_j) / Σ_{j ≠ i} w_j for every candidate of every prompt   (design 2.4)

    rewards: (N,), rows of prompt p are starts[p] … starts[p + 1] − 1, at least 2
    log_reference: (N,) log w, the candidates' shares of π_ref, nats; None where π_ref drew them all: w is then alike,
        and the mean of p̄ over a prompt is ½ whatever the rewards are
    Returns (N,) p̄ and (N,) its standard error over the opponents, the square root of Σ w²(P − p̄)²/(Σ w)².
    """
    shares = np.ones(len(rewards)) if log_reference is None else np.exp(log_reference)
    found, errors = np.empty(len(rewards)), np.empty(len(rewards))
    for first, last in pairwise(starts):
        own, weights = rewards[first:last], np.tile(shares[first:last], (last - first, 1))
        np.fill_diagonal(weights, 0.0)
        weights /= weights.sum(axis=1, keepdims=True)
        wins = link(own[:, None] - own[None, :])
        found[first:last] = np.minimum((weights * wins).sum(axis=1), 1.0)  # the shares sum to 1 up to rounding
        errors[first:last] = np.sqrt(np.square(weights * (wins - found[first:last, None])).sum(axis=1))
    return found, errors


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
