"""The whole trade-off from one set of scored samples: rewards, win rates, KL and length of any λ, before decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

import numpy as np

from mpo_ray.data.scores import ScoreTable
from mpo_ray.fitting.table_fit import Estimator
from mpo_ray.maths.fit_uncertainty import ENOUGH
from mpo_ray.maths.prediction import Prediction, predict, win_values
from mpo_ray.maths.sample_table import SampleTable
from mpo_ray.maths.simplex import Array, simplex_grid

#: Points of a predicted surface, and prompts that it is computed from, at most: more would not be seen in a picture.
MOST_POINTS = 300
MOST_PROMPTS = 20_000


def grid_of(num_objectives: int, steps: int) -> Array:
    """`simplex_grid`, with fewer steps where that would make more than MOST_POINTS."""
    while steps > 1 and comb(steps + num_objectives - 1, num_objectives - 1) > MOST_POINTS:
        steps -= 1
    return simplex_grid(num_objectives, steps)


def predict_trade_off(
    scores: ScoreTable,
    points: Sequence[Mapping[str, float]] | Array,
    *,
    estimator: Estimator,
    draws: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """What trade_off.json holds: the predictions of every λ in `points`, (G, K) or by name, for π_λ.

    Rewards and win rates need `reward_<objective>` columns, lengths `num_tokens`; without them they are left out, and
    win rates also where π_ref drew fewer than 2 responses of a prompt. `reliable` is false where the median effective
    sample size is below ENOUGH. What decoding token by token gives is not π_λ (design 2.3).
    """
    names = list(scores.objectives)
    weights = np.array([[p.get(n, 0.0) for n in names] if isinstance(p, Mapping) else p for p in points], dtype=float)
    table = scores.samples(estimator)
    rows, values, columns = scores.rows(estimator), [], []
    if scores.rewards is not None:
        rewards = np.asarray(scores.rewards[rows], dtype=np.float64)
        values.append(rewards)
        columns += [("rewards", name) for name in names]
        by_reference = scores.drawn_by[rows] == 0
        if np.add.reduceat(by_reference.astype(np.int64), table.starts[:-1]).min() >= 2:
            values.append(win_values(rewards, by_reference, table.starts))
            columns += [("win_rates", name) for name in names]
    if scores.num_tokens is not None:
        values.append(np.asarray(scores.num_tokens[rows], dtype=np.float64)[:, None])
        columns.append(("num_tokens", ""))
    given = np.hstack([np.zeros((len(table.log_ratios), 0)), *values])
    first = min(table.num_prompts, MOST_PROMPTS)
    last = int(table.starts[first])
    part = SampleTable(table.log_ratios[:last], table.log_proposal[:last], table.starts[: first + 1])
    found = predict(
        part,
        weights,
        given[:last],
        draws=draws if first > 1 else 0,
        confidence=confidence,
        rng=np.random.default_rng(seed),
    )
    return {
        "objectives": names,
        "estimator": estimator,
        "num_prompts": first,
        "confidence": confidence,
        "points": [_point(names, point, columns, p) for point, p in zip(weights, found, strict=True)],
    }


def _point(
    names: Sequence[str], weights: Array, columns: Sequence[tuple[str, str]], found: Prediction
) -> dict[str, Any]:
    point: dict[str, Any] = {"weights": dict(zip(names, weights.tolist(), strict=True))}
    for (kind, name), value in zip(columns, found.values, strict=True):
        if name:
            point.setdefault(kind, {})[name] = _estimate(value)
        else:
            point[kind] = _estimate(value)
    size = found.effective_sample_size
    return point | {"kl": _estimate(found.kl), "effective_sample_size": size, "reliable": size >= ENOUGH}


def _estimate(value: Array) -> list[float]:
    """[value, low, high], or [value] without an interval."""
    return [float(v) for v in value if np.isfinite(v)]


def best_minimum(trade_off: Mapping[str, Any]) -> dict[str, Any] | None:
    """The reliable point with the best predicted minimum win rate, None where there are no predicted win rates."""
    points = [p for p in trade_off["points"] if p["reliable"] and "win_rates" in p]
    return max(points, key=minimum_win_rate) if points else None


def minimum_win_rate(point: Mapping[str, Any]) -> float:
    return float(min(value[0] for value in point["win_rates"].values()))
