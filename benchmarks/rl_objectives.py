"""The decisions that RL on several objectives takes: which one is worst, in which units, and when to end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Weight of the newest batch in the running average of each objective's expected reward.
NEWEST = 0.3

Floats = NDArray[np.float64]


class WorstObjective:
    """argmin_k of a running average of E_π[r̃_k]: which objective MaxMin-RLHF maximises next."""

    def __init__(self, newest: float = NEWEST) -> None:
        self._newest = newest
        self.expected: Floats | None = None

    def __call__(self, rewards: Floats) -> int:
        """rewards: (B, K) r̃ of the batch that π has just drawn. Returns k; the first of equals."""
        mean = rewards.mean(axis=0)
        previous = mean if self.expected is None else self.expected
        self.expected = previous + self._newest * (mean - previous)
        return int(self.expected.argmin())


def moments(rewards: Floats, objectives: Sequence[str]) -> tuple[Floats, Floats]:
    """Mean and standard deviation (K,) of rewards (N, K) of completions of π_ref.

    Raises ValueError for a reward that is the same for all of them.
    """
    mean, deviation = rewards.mean(axis=0), rewards.std(axis=0)
    for name, value in zip(objectives, deviation, strict=True):
        if not value > 0.0:
            raise ValueError(
                f"the reward of objective {name!r} is the same for all {len(rewards)} completions of the reference; it "
                "cannot be standardised. Take the objective out, or use --reward implicit."
            )
    return mean, deviation


def log_odds_per_unit(differences: Floats) -> float:
    """argmax_s Σ_i log σ(s d_i): what one unit of a reward is worth in log-odds of being preferred (Bradley–Terry).

    differences: (N,) reward of the chosen minus that of the rejected completion. This is the unit of the rewards that
    DPO fits, and so the one in which the β of a run is meant. Raises ValueError where no finite s > 0 is the maximum.
    """
    if not (differences < 0).any() or not differences.sum() > 0:
        raise ValueError(
            f"{int((differences < 0).sum())} of {len(differences)} pairs prefer the response of lower reward, and the "
            f"mean difference is {differences.mean():.3g}: they do not say what a unit of reward is worth. Give --beta."
        )
    scale = 0.0
    for _ in range(100):  # Newton's method: the sum is concave in s
        wrong = 1.0 / (1.0 + np.exp(np.clip(scale * differences, -500, 500)))
        step = float((wrong * differences).sum() / (wrong * (1 - wrong) * differences**2).sum())
        scale += step
        if abs(step) < 1e-9 * scale:
            break
    return scale


def plateaued(values: Sequence[float], window: int) -> bool:
    """Whether the mean of the last `window` values is within one standard error of that of the `window` before it."""
    if len(values) < 2 * window:
        return False
    before, last = np.asarray(values[-2 * window : -window]), np.asarray(values[-window:])
    error = np.sqrt((before.var(ddof=1) + last.var(ddof=1)) / window)
    return bool(last.mean() - before.mean() < error)
