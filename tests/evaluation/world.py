"""A small world of reviews with known tendencies: each candidate is three numbers, each reward a count."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa

from mpo_ray.config import Evaluation, Fit, MirrorSteps
from mpo_ray.data.scores import ScoreTable, scores_from_table
from mpo_ray.evaluation.candidates import Candidate, grid_candidates
from mpo_ray.evaluation.metrics import Metrics, evaluate_completions
from mpo_ray.evaluation.pareto import compare_points, families_of
from mpo_ray.fitting.standalone import fit_scores
from mpo_ray.fitting.trade_off import predict_trade_off

OBJECTIVES = ["positive", "concise", "detailed"]
GOOD = ["a delight", "warm and funny", "superb", "moving", "well acted"]
BAD = ["a mess", "dull", "far too long", "badly cast", "forgettable"]
DETAILS = ["the camera lingers on the harbour", "the second act doubles back", "the score is all strings"]
#: Rows per token of the candidates that every table has.
COSTS = {"reference": 1, "positive": 1, "concise": 1, "detailed": 1, "uniform": 3, "mpo": 3}
FIELDS = ("good", "clauses", "details", "kl")
OPENINGS = ["I went with my sister and", "The film opens on a pier;", "Nobody told me that", "After two hours,"]


@dataclass(frozen=True)
class Tendency:
    """How a candidate writes: share of good words, mean number of clauses, share of clauses that are details."""

    good: float
    clauses: float
    details: float
    kl: float
    log_z: float = 0.0


WORLD = {
    "reference": Tendency(0.50, 5.0, 0.30, 0.0),
    "positive": Tendency(0.85, 5.0, 0.25, 3.1),
    "concise": Tendency(0.45, 3.2, 0.20, 2.6),
    "detailed": Tendency(0.45, 6.0, 0.50, 3.4),
    "uniform": Tendency(0.62, 4.6, 0.36, 0.9, -1.4),
    "mpo": Tendency(0.63, 4.3, 0.42, 1.2, -1.2),
}


#: All kinds of candidates: soups, another fit's mixture, given weights, somebody's model.
ALL_KINDS = {
    **WORLD,
    "soup-uniform": Tendency(0.60, 4.7, 0.35, 0.8),
    "soup-mpo": Tendency(0.60, 4.5, 0.38, 1.0),
    "fit-paper": Tendency(0.55, 4.0, 0.33, 2.0, -0.4),
    "mostly-concise": Tendency(0.50, 3.7, 0.27, 1.9, -0.9),
    "morlhf": Tendency(0.60, 4.4, 0.40, 1.5),
}
WEIGHTS = {
    "mpo": (0.41, 0.25, 0.34),
    "soup-mpo": (0.41, 0.25, 0.34),
    "fit-paper": (0.1, 0.7, 0.2),
    "mostly-concise": (0.2, 0.7, 0.1),
}


def completions(
    *, num_prompts: int = 120, per_prompt: int = 2, seed: int = 0, world: dict[str, Tendency] = WORLD
) -> pa.Table:
    """A completions table: every candidate of `world` on the same prompts, rewards computed from the text."""
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(num_prompts):
        opening = OPENINGS[p % len(OPENINGS)]
        for candidate, tendency in world.items():
            for n in range(per_prompt):
                text, finished = _review(tendency, rng)
                rows.append(
                    {
                        "candidate": candidate,
                        "prompt_id": f"{p:016x}",
                        "completion_id": n,
                        "prompt": opening,
                        "is_chat": False,
                        "response": text,
                        "num_tokens": len(text.split()),
                        "finished": finished,
                        "kl": float(tendency.kl * rng.gamma(8.0, 1.0 / 8.0)),
                        "log_z": tendency.log_z * len(text.split()) / 20.0,
                        "reward_positive": float(sum(w in text for w in GOOD) - sum(w in text for w in BAD)),
                        "reward_concise": -float(len(text.split())),
                        "reward_detailed": float(sum(text.count(w) for w in DETAILS)),
                    }
                )
    return pa.Table.from_pylist(rows)


def evaluated(table: pa.Table | None = None) -> Metrics:
    """The metrics of a table (of the world's, if none is given), with few draws."""
    table = completions() if table is None else table
    return evaluate_completions(table, OBJECTIVES, draws=400, confidence=0.95, seed=0, rows_per_token=COSTS)


def records(objectives: list[str] = OBJECTIVES) -> dict[str, Candidate]:
    """The records of `ALL_KINDS`."""
    vertices = {name: tuple(float(other == name) for other in objectives) for name in objectives}
    even = (1 / len(objectives),) * len(objectives)
    weights = {**vertices, "uniform": even, "soup-uniform": even, **WEIGHTS}
    mixed = {n: Candidate("soup" if n.startswith("soup") else "mixture", w) for n, w in weights.items()}
    return {"reference": Candidate("reference"), **mixed, "morlhf": Candidate("model", path="models/morlhf")}


def grid(steps: int) -> tuple[dict[str, Candidate], dict[str, Tendency]]:
    """Mixtures and soups on a grid: between the policies, mixtures a little better than soups."""
    candidates = grid_candidates(3, Evaluation(grid=steps))
    corners = [WORLD[name] for name in OBJECTIVES]
    world = {}
    for name, candidate in candidates.items():
        inside = 1.0 - max(candidate.weights or (1.0,))
        gain = inside * (0.12 if candidate.kind == "mixture" else 0.06)
        mean = [sum(w * getattr(c, f) for w, c in zip(candidate.weights or (), corners, strict=True)) for f in FIELDS]
        world[name] = Tendency(mean[0] + gain, mean[1] - gain, mean[2] + gain, mean[3])
    return candidates, world


@cache
def with_front(*, steps: int | None = 4, num_prompts: int = 40, num_points: int = 24) -> Metrics:
    """The metrics of all kinds of candidates, with their front; the grid is on the first prompts only."""
    table = completions(num_prompts=num_prompts, world=ALL_KINDS)
    candidates, world = ({}, {}) if steps is None else grid(steps)
    points = completions(num_prompts=num_points, world={**ALL_KINDS, **world})
    pareto = compare_points(
        points,
        OBJECTIVES,
        records() | candidates,
        families_of(OBJECTIVES, records(), candidates),
        draws=100,
        confidence=0.95,
        seed=0,
    )
    return replace(evaluate_completions(table, OBJECTIVES, draws=200, confidence=0.95, seed=0), pareto=pareto)


@cache
def scores() -> ScoreTable:
    """Scored samples of the reference and of the policies of this world, with rewards and lengths."""
    rng = np.random.default_rng(2)
    rows: dict[str, list[object]] = {}
    for p, proposal, sample in product(range(24), ["reference", *OBJECTIVES], range(4)):
        log_ratios = rng.normal(-0.3, 0.8, size=3) + [1.1 * (proposal == name) for name in OBJECTIVES]
        log_ratios[1] -= 0.9 * log_ratios[2]
        values = {"prompt_id": f"{p:016x}", "proposal": proposal, "num_tokens": int(rng.integers(10, 40))}
        values["sample_id"] = 4 * ["reference", *OBJECTIVES].index(proposal) + sample
        for name, log_ratio in zip(OBJECTIVES, log_ratios, strict=True):
            values |= {f"log_ratio_{name}": log_ratio, f"reward_{name}": log_ratio + 0.5 * rng.normal()}
        for name, value in values.items():
            rows.setdefault(name, []).append(value)
    return scores_from_table(pa.table(rows))


@cache
def _fitted() -> tuple[dict[str, Any], dict[str, Any]]:
    settings = Fit(method="bsmd", bsmd=MirrorSteps(steps=200, step_scale=4.0), bootstrap_draws=40, grid=5)
    found, trade_off = fit_scores(scores(), settings, seed=0, method="bsmd", beta=0.5)
    exact = {
        name: fit_scores(scores(), settings.model_copy(update={"estimator": name}), seed=0, method="exact", beta=0.5)[0]
        for name in ("paper", "balanced")
    }
    return found | {"alternatives": exact}, trade_off


def fit() -> dict[str, Any]:
    """What fit.json holds for this world: BSMD by the balanced estimator, and both exact fits beside it."""
    return deepcopy(_fitted()[0])


def trade_off() -> dict[str, Any]:
    """What trade_off.json holds for this world."""
    return deepcopy(_fitted()[1])


def predicted() -> dict[str, Any]:
    """What the samples predict of the candidates with known weights."""
    vertices = {name: {name: 1.0} for name in OBJECTIVES}
    weights = {**vertices, "uniform": dict.fromkeys(OBJECTIVES, 1 / 3), "mpo": fit()["weights"]}
    points = predict_trade_off(
        scores(), list(weights.values()), estimator="balanced", draws=40, confidence=0.95, seed=0
    )["points"]
    return dict(zip(weights, points, strict=True))


def _review(tendency: Tendency, rng: np.random.Generator) -> tuple[str, bool]:
    num_clauses = 1 + int(rng.poisson(tendency.clauses - 1.0))
    clauses = []
    for _ in range(num_clauses):
        if rng.random() < tendency.details:
            clauses.append(str(rng.choice(DETAILS)))
        else:
            clauses.append("it was " + str(rng.choice(GOOD if rng.random() < tendency.good else BAD)))
    return " " + ", ".join(clauses) + ".", num_clauses < 9
