"""A small world of reviews with known tendencies: each candidate is three numbers, each reward a count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mpo_ray.evaluation.metrics import Metrics, evaluate_completions

OBJECTIVES = ["positive", "concise", "detailed"]
GOOD = ["a delight", "warm and funny", "superb", "moving", "well acted"]
BAD = ["a mess", "dull", "far too long", "badly cast", "forgettable"]
DETAILS = ["the camera lingers on the harbour", "the second act doubles back", "the score is all strings"]
OPENINGS = ["I went with my sister and", "The film opens on a pier;", "Nobody told me that", "After two hours,"]


@dataclass(frozen=True)
class Tendency:
    """How a candidate writes: share of good words, mean number of clauses, share of clauses that are details."""

    good: float
    clauses: float
    details: float
    kl: float


WORLD = {
    "reference": Tendency(0.50, 5.0, 0.30, 0.0),
    "positive": Tendency(0.85, 5.0, 0.25, 3.1),
    "concise": Tendency(0.45, 3.2, 0.20, 2.6),
    "detailed": Tendency(0.45, 6.0, 0.50, 3.4),
    "uniform": Tendency(0.62, 4.6, 0.36, 0.9),
    "mpo": Tendency(0.63, 4.3, 0.42, 1.2),
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
                        "reward_positive": float(sum(w in text for w in GOOD) - sum(w in text for w in BAD)),
                        "reward_concise": -float(len(text.split())),
                        "reward_detailed": float(sum(text.count(w) for w in DETAILS)),
                    }
                )
    return pa.Table.from_pylist(rows)


def evaluated(table: pa.Table | None = None) -> Metrics:
    """The metrics of a table (of the world's, if none is given), with few draws."""
    table = completions() if table is None else table
    return evaluate_completions(table, OBJECTIVES, draws=400, confidence=0.95, seed=0)


def fit() -> dict[str, object]:
    """What a BSMD fit of this world could have written: 200 steps, every tenth kept."""
    steps = np.arange(0, 201, 10)
    logits = np.log(3 * np.array([0.42, 0.24, 0.34]))[None] * (1 - np.exp(-steps / 40.0))[:, None]
    logits += 0.05 * np.random.default_rng(1).normal(size=logits.shape) * (steps > 0)[:, None]
    trace = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return {
        "method": "bsmd",
        "objectives": OBJECTIVES,
        "weights": {"positive": 0.41, "concise": 0.25, "detailed": 0.34},
        "trace": [[int(step), *row] for step, row in zip(steps, trace.tolist(), strict=True)],
        "objective_value": -0.31,
        "effective_sample_size": {"min": 1.4, "median": 5.2},
        "gradient": {"positive": -0.21, "concise": -0.2, "detailed": -0.22},
        "num_prompts": 256,
        "samples_per_prompt": 8,
        "steps": 200,
        "step_size": 0.0707,
    }


def _review(tendency: Tendency, rng: np.random.Generator) -> tuple[str, bool]:
    num_clauses = 1 + int(rng.poisson(tendency.clauses - 1.0))
    clauses = []
    for _ in range(num_clauses):
        if rng.random() < tendency.details:
            clauses.append(str(rng.choice(DETAILS)))
        else:
            clauses.append("it was " + str(rng.choice(GOOD if rng.random() < tendency.good else BAD)))
    return " " + ", ".join(clauses) + ".", num_clauses < 9
