"""Whether any policy on a pool meets the bounds, and if none does, which bound is too high and by how much.

The linear programme over all policies of the pool, without KL penalty, solved in its dual: one unknown per bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from mpo_ray.maths.pool import Pool
from mpo_ray.maths.simplex import Array

#: Slack below which bounds count as not met: only policies that leave single candidates have less, and no multiplier.
LEAST_SLACK = 1e-6
#: Planes at most and their accuracy, in units of win probability; how much of one objective another may be worth.
MAX_PLANES, ACCURACY, STEEPEST = 1000, 1e-9, 1e4


class InfeasibleBoundsError(ValueError):
    """No policy on the pool meets the bounds."""


@dataclass(frozen=True, slots=True, eq=False)
class Feasibility:
    """What policies on a pool can reach.

    slack: max_π min_j (E_π[q̄_j] − b_j), in units of win probability, or less where it is enough; +∞ without bounds
    best: (J,) max_π E_π[q̄_j], each alone: the mean over prompts of the best candidate
    largest: (J,) the largest b_j that leaves the others as they are feasible, NaN where they are not by themselves
    worst: the bound to lower first, None where all can be met together
    """

    slack: float
    best: Array
    largest: Array
    worst: int | None


def feasibility(pool: Pool, bounds: Array) -> Feasibility:
    """Decide whether bounds (J,) can be met together on the pool, whatever that costs the primary objective."""
    best = np.maximum.reduceat(pool.secondary, pool.starts[:-1], axis=0).mean(axis=0)
    slack = _largest_slack(pool.secondary, pool.starts, bounds) if len(bounds) else np.inf
    if slack >= LEAST_SLACK:
        return Feasibility(slack, best, np.full(len(bounds), np.nan), None)
    largest = np.array([_largest_bound(pool, bounds, j) for j in range(len(bounds))])
    over = bounds - np.where(np.isnan(largest), best, largest)
    return Feasibility(slack, best, largest, int(over.argmax()))


def check_feasible(pool: Pool, bounds: Array, names: Sequence[str]) -> Feasibility:
    """What policies can reach, where they can meet the bounds.

    Raises InfeasibleBoundsError that names the objective, its best value and its largest feasible bound.
    """
    found = feasibility(pool, bounds)
    if found.worst is None:
        return found
    name, asked = names[found.worst], bounds[found.worst]
    best, largest = found.best[found.worst], found.largest[found.worst]
    text = f"bound {name} ≥ {asked:.4f} cannot be met: the best that any policy on this pool reaches is {best:.4f}"
    others = [f"{other} ≥ {bound:.4f}" for other, bound in zip(names, bounds, strict=True) if other != name]
    if others and np.isnan(largest):
        text += f", and {', '.join(others)} cannot be met together even without it"
    elif others:
        text += f", and with {', '.join(others)} it is {largest:.4f}"
    raise InfeasibleBoundsError(f"{text}. Lower the bound, or add better candidates to the pool.")


def _largest_slack(values: Array, starts: NDArray[np.int64], bounds: Array) -> float:
    """max_π min_j (E_π[q̄_j] − b_j) = min over v on the simplex of E_x max_y ⟨v, q̄ − b⟩."""
    num = len(bounds)
    sums = np.ones((1, num)), np.ones(1)
    return _lowest(values - bounds, starts, np.full(num, 1.0 / num), [(0.0, 1.0)] * num, sums, LEAST_SLACK)


def _largest_bound(pool: Pool, bounds: Array, which: int) -> float:
    """max E_π[q̄_which] with the other bounds met, = min over μ ≥ 0 of E_x max_y (q̄_which + ⟨μ, q̄_others − b⟩)."""
    others = np.arange(len(bounds)) != which
    if others.any() and _largest_slack(pool.secondary[:, others], pool.starts, bounds[others]) < 0:
        return float("nan")
    box = [(0.0, STEEPEST) if other else (1.0, 1.0) for other in others]
    return _lowest(pool.secondary - np.where(others, bounds, 0.0), pool.starts, np.eye(len(bounds))[which], box, None)


def _lowest(
    values: Array,
    starts: NDArray[np.int64],
    start: Array,
    box: list[tuple[float, float]],
    equality: tuple[Array, Array] | None,
    enough: float = np.inf,
) -> float:
    """min_v E_x max_y ⟨v, values⟩ over a box, by cutting planes: convex and piecewise linear in a few unknowns.

    enough: a lower bound that is as good as the minimum
    """
    point, best, planes = start, np.inf, list[Array]()
    for _ in range(MAX_PLANES):
        plane = _plane(values, starts, point)
        best = min(best, float(plane @ point))
        planes.append(plane)
        found = linprog(
            np.concatenate([np.zeros(len(point)), [1.0]]),
            A_ub=np.column_stack([planes, -np.ones(len(planes))]),
            b_ub=np.zeros(len(planes)),
            A_eq=None if equality is None else np.column_stack([equality[0], [0.0]]),
            b_eq=None if equality is None else equality[1],
            bounds=[*box, (None, None)],
            method="highs",
        )
        point = found.x[:-1]
        if found.fun >= enough:
            return float(found.fun)
        if best - found.fun <= ACCURACY:
            break
    return best


def _plane(values: Array, starts: NDArray[np.int64], point: Array) -> Array:
    """E_x of the candidate's values that ⟨v, ·⟩ prefers: the slope of the maximum at v."""
    worth = values @ point
    sizes = np.diff(starts)
    chosen = worth >= np.repeat(np.maximum.reduceat(worth, starts[:-1]), sizes)
    shares = chosen / np.repeat(np.add.reduceat(chosen.astype(float), starts[:-1]), sizes)  # ties count alike
    return np.asarray(shares @ values / len(sizes))
