"""MOPO's certificate: whether a policy's bounds hold on held-out prompts, with intervals (design 2.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from mpo_ray.evaluation.completions import read_cells
from mpo_ray.evaluation.estimates import Estimate, written
from mpo_ray.maths.bounded_means import bounded_means
from mpo_ray.maths.win_probability import Link
from mpo_ray.records import REFERENCE

MET, NOT_MET, UNDECIDED = "met", "not met", "undecided"


def certify(
    completions: pa.Table,
    candidate: str,
    primary: str,
    bounds: Mapping[str, float],
    *,
    link: Link,
    draws: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """E[p̄] and every E[q̄] of a candidate's completions, against the reference's of the same prompts.

    completions: an evaluation's table; bounds: objective → b; link: of the win probabilities that were bounded
    A bound is `met` where the whole interval is at least b, `not met` where all of it is below, else `undecided`.
    Intervals are those of `bounded_means`, one at a time: not simultaneous over the bounds.
    """
    names = [primary, *bounds]
    cells, prompts = read_cells(completions, names)
    ours, reference = cells[candidate].rewards, cells[REFERENCE].rewards
    wins = [link(ours[n][:, :, None] - reference[n][:, None, :]).mean(axis=(1, 2)) for n in names]
    values = np.stack(wins, axis=1)
    drawn = bounded_means(values, draws, np.random.default_rng(seed))
    found = dict(zip(names, Estimate.of_each(drawn, confidence), strict=True))
    return {
        "primary": {primary: asdict(found[primary])},
        "bounds": {n: {"bound": b, **asdict(found[n]), "verdict": _verdict(found[n], b)} for n, b in bounds.items()},
        "num_prompts": len(prompts),
        "num_completions": int(np.prod(next(iter(ours.values())).shape)),
        "confidence": confidence,
        "draws": draws,
    }


def certificate_lines(name: str, certificate: Mapping[str, Any]) -> Sequence[str]:
    """The certificate for the terminal, a line per objective."""
    [(primary, value)] = certificate["primary"].items()
    return [
        f"{name}: {primary} {shown_estimate(value)}",
        *(
            f"  {objective} {shown_estimate(found)}, bound {found['bound']:.3f}: {found['verdict']}"
            for objective, found in certificate["bounds"].items()
        ),
    ]


def shown_estimate(found: Mapping[str, Any]) -> str:
    """A certificate's value with its interval."""
    return written(Estimate(found["value"], found["low"], found["high"]), 3)


def _verdict(estimate: Estimate, bound: float) -> str:
    assert estimate.low is not None
    assert estimate.high is not None
    if estimate.low >= bound:
        return MET
    return NOT_MET if estimate.high < bound else UNDECIDED
