"""The Pareto front of win rates, the volume that a family dominates, and MPO against the grid (design 2.5).

A point dominates another if its win rate is no lower on any objective and higher on one. The hypervolume of a family is
the volume of all win rates that one of its points dominates, above the reference point 0: no candidate wins less, so no
point is left out and the point does not depend on who takes part; the volume is the dominated share of the unit cube.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import moocore
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mpo_ray.evaluation.candidates import Candidate
from mpo_ray.evaluation.completions import Resampled, resample
from mpo_ray.evaluation.estimates import Estimate, estimates_from_json
from mpo_ray.maths.bounded_means import BoundedMeans, difference_of_minima, prompts_to_decide
from mpo_ray.records import GRID_PREFIX, MOPO_PREFIX, MPO, REFERENCE, SOUP_MPO, SOUP_UNIFORM, UNIFORM

#: Win rate of each objective from which volumes are measured.
REFERENCE_POINT = 0.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Point:
    """One candidate or point of the grid. weights: λ by objective; None for the reference and other models."""

    kind: str
    weights: dict[str, float] | None
    win_rates: dict[str, Estimate]


@dataclass(frozen=True, slots=True)
class Hypervolume:
    """Dominated volume of the mixtures and of the soups at the same weights; both hold the single policies.

    num_points: of both families; difference: mixture − soup, paired, by percentiles; no interval where both are the
        same in every draw. No soup: None.
    mopo: that of MOPO's policies alone, num_mopo of them
    The volume of estimates is biased high, the more the fewer the prompts, and alike for both families.
    """

    mixture: Estimate
    soup: Estimate | None
    difference: Estimate | None
    num_points: int
    reference_point: dict[str, float]
    mopo: Estimate | None = None
    num_mopo: int = 0


@dataclass(frozen=True, slots=True)
class AgainstGrid:
    """MPO's minimum win rate against every point of the grid that is no named candidate.

    above, undecided, below: how many points MPO is above or below outside the interval of the paired difference
    best: the point with the highest estimate, which is flattered by being the best of many; minimum: its minimum win
        rate; mpo_minus_best: the paired difference; prompts_to_decide: as in `metrics.CandidateMetrics`
    """

    above: int
    undecided: int
    below: int
    best: str
    minimum: Estimate
    mpo_minus_best: Estimate
    prompts_to_decide: int | None


@dataclass(frozen=True, slots=True)
class Pareto:
    """All points on the same prompts; `front` names those that no other dominates.

    A point of the grid that is one of the named candidates is in the front under its name only.
    """

    points: dict[str, Point]
    front: list[str]
    hypervolume: Hypervolume
    num_prompts: int
    against_grid: AgainstGrid | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Pareto:
        points = {
            name: Point(point["kind"], point["weights"], estimates_from_json(point["win_rates"]))
            for name, point in value["points"].items()
        }
        volume = value["hypervolume"]
        kinds = ("mixture", "soup", "difference", "mopo")
        estimates = {key: Estimate(**volume[key]) if volume.get(key) else None for key in kinds}
        against = value.get("against_grid")
        if against is not None:
            numbers = {key: Estimate(**against[key]) for key in ("minimum", "mpo_minus_best")}
            against = AgainstGrid(**{**against, **numbers})
        return cls(points, value["front"], Hypervolume(**{**volume, **estimates}), value["num_prompts"], against)


def compare_points(
    table: pa.Table,
    objectives: Sequence[str],
    candidates: Mapping[str, Candidate],
    families: Mapping[str, Sequence[str]],
    *,
    draws: int,
    confidence: float,
    seed: int,
) -> Pareto:
    """Find the front of all candidates of a completions table, and the hypervolume of each family.

    table: as `completions.resample` has it; candidates: every candidate of the table
    families: `mixture`, and `soup` and `mopo` where there are some: names of the candidates that belong to it
    """
    found = resample(table, objectives, draws=draws, seed=seed)
    points = {}
    for name, means in found.wins.items():
        weights = candidates[name].weights
        rates = [Estimate(0.5)] * len(objectives) if name == REFERENCE else Estimate.of_each(means, confidence)
        points[name] = Point(
            kind=candidates[name].kind,
            weights=None if weights is None else dict(zip(objectives, weights, strict=True)),
            win_rates=dict(zip(objectives, rates, strict=True)),
        )
    volumes, estimates = {}, {}
    for family, names in families.items():
        own = [found.wins[name] for name in names]
        value = hypervolume(np.stack([means.mean for means in own]))
        low, high = (
            np.array([hypervolume(draw) for draw in np.stack(drawn, axis=-2)])
            for drawn in ([means.low for means in own], [means.high for means in own])
        )
        volumes[family] = value, low
        ends = Estimate.of_each(BoundedMeans(np.array([value]), low[:, None], high[:, None]), confidence)
        estimates[family] = ends[0]
    difference = None
    if "soup" in volumes:
        (ours, our_draws), (theirs, their_draws) = volumes["mixture"], volumes["soup"]
        difference = Estimate.over(ours - theirs, our_draws - their_draws, confidence)
    known = {c.distribution for name, c in candidates.items() if not name.startswith(GRID_PREFIX)}
    copies = {n for n, c in candidates.items() if n.startswith(GRID_PREFIX) and c.distribution in known}
    return Pareto(
        points=points,
        front=nondominated({name: means.mean for name, means in found.wins.items() if name not in copies}),
        hypervolume=Hypervolume(
            mixture=estimates["mixture"],
            soup=estimates.get("soup"),
            difference=difference,
            num_points=len(families["mixture"]),
            reference_point=dict.fromkeys(objectives, REFERENCE_POINT),
            mopo=estimates.get("mopo"),
            num_mopo=len(families.get("mopo", ())),
        ),
        num_prompts=len(found.prompts),
        against_grid=_against_grid(
            found, [n for n in candidates if n.startswith(GRID_PREFIX) and n not in copies], confidence
        ),
    )


def _against_grid(found: Resampled, names: Sequence[str], confidence: float) -> AgainstGrid | None:
    if MPO not in found.wins or not names:
        return None
    ours = found.wins[MPO]
    gaps = {name: difference_of_minima(ours, found.wins[name], confidence) for name in names}
    best = max(names, key=lambda name: found.wins[name].mean.min())
    above, below = sum(gap.low > 0.0 for gap in gaps.values()), sum(gap.high < 0.0 for gap in gaps.values())
    size = {"num_prompts": len(found.prompts), "num_objectives": ours.low.shape[1]}
    return AgainstGrid(
        above=above,
        undecided=len(names) - above - below,
        below=below,
        best=best,
        minimum=Estimate.of_minimum(found.wins[best], confidence),
        mpo_minus_best=Estimate.of_difference(gaps[best]),
        prompts_to_decide=prompts_to_decide(gaps[best], **size, confidence=confidence),
    )


def families_of(
    objectives: Sequence[str], named: Mapping[str, Candidate], grid: Mapping[str, Candidate]
) -> dict[str, list[str]]:
    """Mixtures and soups at the same weights (of the grid, or without one the named ones and the policies); MOPO's."""
    families = {"mixture": [*objectives, UNIFORM, MPO], "soup": []}
    if grid:
        families = {kind: [name for name, c in grid.items() if c.kind == kind] for kind in families}
    elif SOUP_UNIFORM in named:
        families["soup"] = [*objectives, SOUP_UNIFORM, SOUP_MPO]
    families["mopo"] = [name for name in named if name.startswith(MOPO_PREFIX)]
    return {kind: names for kind, names in families.items() if names}


def hypervolume(points: Floats) -> float:
    """Volume of {w : 0 ≤ w ≤ some point}, by objective; points: (N, K) win rates."""
    return float(moocore.hypervolume(points, ref=REFERENCE_POINT, maximise=True))


def nondominated(points: Mapping[str, Floats]) -> list[str]:
    """Names of the points (K,) that no other dominates; equal points do not dominate each other."""
    kept = moocore.is_nondominated(np.stack(list(points.values())), maximise=True, keep_weakly=True)
    return [name for name, keep in zip(points, kept, strict=True) if keep]
