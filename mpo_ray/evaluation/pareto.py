"""The Pareto front of win rates and the volume that a family of candidates dominates (design 2.5).

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
from mpo_ray.evaluation.completions import resample
from mpo_ray.evaluation.estimates import Estimate, estimates_from_json
from mpo_ray.records import GRID_PREFIX, MOPO_PREFIX, MPO, SOUP_MPO, SOUP_UNIFORM, UNIFORM

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

    num_points: of both families; difference: mixture − soup, paired. No soup: None.
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
class Pareto:
    """All points on the same prompts; `front` names those that no other dominates.

    A point of the grid that is one of the named candidates is in the front under its name only.
    """

    points: dict[str, Point]
    front: list[str]
    hypervolume: Hypervolume
    num_prompts: int

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Pareto:
        points = {
            name: Point(point["kind"], point["weights"], estimates_from_json(point["win_rates"]))
            for name, point in value["points"].items()
        }
        volume = value["hypervolume"]
        kinds = ("mixture", "soup", "difference", "mopo")
        estimates = {key: Estimate(**volume[key]) if volume.get(key) else None for key in kinds}
        return cls(points, value["front"], Hypervolume(**{**volume, **estimates}), value["num_prompts"])


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
    for name, (means, drawn) in found.wins.items():
        weights = candidates[name].weights
        points[name] = Point(
            kind=candidates[name].kind,
            weights=None if weights is None else dict(zip(objectives, weights, strict=True)),
            win_rates={o: Estimate.over(means[k], drawn[:, k], confidence) for k, o in enumerate(objectives)},
        )
    volumes = {}
    for family, names in families.items():
        means, drawn = (np.stack([found.wins[name][i] for name in names], axis=-2) for i in (0, 1))
        volumes[family] = hypervolume(means), np.array([hypervolume(draw) for draw in drawn])
    estimates = {family: Estimate.over(value, drawn, confidence) for family, (value, drawn) in volumes.items()}
    difference = None
    if "soup" in volumes:
        (ours, our_draws), (theirs, their_draws) = volumes["mixture"], volumes["soup"]
        difference = Estimate.over(ours - theirs, our_draws - their_draws, confidence)
    known = {c.distribution for name, c in candidates.items() if not name.startswith(GRID_PREFIX)}
    copies = {n for n, c in candidates.items() if n.startswith(GRID_PREFIX) and c.distribution in known}
    return Pareto(
        points=points,
        front=nondominated({name: means for name, (means, _) in found.wins.items() if name not in copies}),
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
