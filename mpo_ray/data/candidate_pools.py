"""MOPO's pool from what a run has: its scored samples, or pairs that several objectives label (design 2.4, 5.2).

A row is a candidate: `prompt_id`, `response_id`, `prompt_ids`, `response_ids`, `log_ref` (its share of π_ref among the
prompt's candidates, log) and for every objective `win_<objective>` and `error_<objective>`, its standard error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mpo_ray.data.pools import LOG_REF, RESPONSE, WIN, normalised
from mpo_ray.data.score_files import PROMPT, ScoreTableError
from mpo_ray.maths.sample_table import log_proposal
from mpo_ray.maths.simplex import Array
from mpo_ray.maths.win_probability import Link, win_probabilities_from_labels, win_probabilities_in_pool
from mpo_ray.records import REFERENCE, digest

ERROR = "error_"


def pool_of_scores(
    scores: pa.Table,
    objectives: Sequence[str],
    *,
    candidates: Literal["reference", "all"],
    rewards: Mapping[str, str],
    scale: float,
    link: Link,
) -> pa.Table:
    """The samples of a score table with their win probabilities against the reference's (design 5.2).

    candidates: `reference` takes π_ref's samples, each of which stands for an equal share of it; `all` takes every
        proposal's, weighed by π_ref/p̄ of equation (6a), self-normalised within the prompt
    rewards: objective → the column that says who wins; scale: by which it is multiplied
    Raises ScoreTableError where no prompt has two candidates.
    """
    rows = scores.sort_by([(PROMPT, "ascending"), ("sample_id", "ascending")])
    if candidates == REFERENCE:
        rows = rows.filter(pc.equal(rows["proposal"], REFERENCE))
    rows, starts = _of_several(rows)
    shares = normalised(-_log_proposal(rows, starts), starts)
    columns = {
        PROMPT: rows[PROMPT],
        RESPONSE: rows["sample_id"],
        "prompt_ids": rows["prompt_ids"],
        "response_ids": rows["response_ids"],
        LOG_REF: pa.array(shares),
    }
    for name in objectives:
        values = scale * rows[rewards[name]].to_numpy().astype(np.float64)
        wins, errors = win_probabilities_in_pool(values, starts, link, shares)
        columns |= {WIN + name: pa.array(wins), ERROR + name: pa.array(errors)}
    return pa.table(columns)


def pool_of_labels(pairs: Mapping[str, pa.Table]) -> pa.Table:
    """The responses that every objective's pairs compare, each with the share of its comparisons that it won.

    pairs: objective → one row per pair, `prompt_ids`, `chosen_ids`, `rejected_ids`
    The responses of a prompt count alike: μ is whatever the pairs came from. Responses that an objective does not
    compare are left out, and then prompts with fewer than two. Raises ScoreTableError where none is left.
    """
    numbers: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    compared = {}
    for name, table in pairs.items():
        prompts = [tuple(ids) for ids in table["prompt_ids"].to_pylist()]
        sides = []
        for side in ("chosen_ids", "rejected_ids"):
            responses = [tuple(ids) for ids in table[side].to_pylist()]
            sides.append([numbers.setdefault(key, len(numbers)) for key in zip(prompts, responses, strict=True)])
        compared[name] = np.array(sides, dtype=np.int64)
    wins = {
        name: win_probabilities_from_labels(winners, losers, np.ones(len(winners)), len(numbers))
        for name, (winners, losers) in compared.items()
    }
    known = np.flatnonzero(np.isfinite(np.stack(list(wins.values()))).all(axis=0))
    keys = list(numbers)
    order = np.array(sorted(known.tolist(), key=lambda i: (keys[i][0], i)), dtype=np.int64)
    columns = {
        PROMPT: pa.array([digest(list(keys[i][0]))[:16] for i in order], pa.string()),
        RESPONSE: pa.array(order),
        "prompt_ids": pa.array([list(keys[i][0]) for i in order], pa.list_(pa.int32())),
        "response_ids": pa.array([list(keys[i][1]) for i in order], pa.list_(pa.int32())),
    }
    for name, values in wins.items():
        counts = np.bincount(compared[name].ravel(), minlength=len(numbers))[order]
        chosen = values[order]
        columns |= {WIN + name: pa.array(chosen), ERROR + name: pa.array(np.sqrt(chosen * (1 - chosen) / counts))}
    rows, starts = _of_several(pa.table(columns), f"pairs that {' and '.join(pairs)} label alike")
    return rows.append_column(LOG_REF, pa.array(normalised(np.zeros(rows.num_rows), starts)))


def _of_several(rows: pa.Table, what: str = "samples") -> tuple[pa.Table, NDArray[np.int64]]:
    """The rows of prompts with two candidates or more, which lie together, and where each prompt starts."""
    encoded = pc.dictionary_encode(rows[PROMPT].combine_chunks()).indices.to_numpy().astype(np.int64)
    counts = np.bincount(encoded) if len(encoded) else np.zeros(0, dtype=np.int64)
    kept = (counts > 1)[encoded] if len(encoded) else np.zeros(0, dtype=bool)
    if not kept.any():
        raise ScoreTableError(
            f"{what}: no prompt has two candidates, and a policy cannot prefer one to itself. Draw more for each "
            "prompt (samples.samples_per_prompt), or bring objectives that label the same pairs."
        )
    return rows.filter(pa.array(kept)), np.concatenate([[0], np.cumsum(counts[counts > 1])])


def _log_proposal(rows: pa.Table, starts: NDArray[np.int64]) -> Array:
    """log p̄/π_ref of every row, where p̄ is what its prompt's candidates were drawn from   (eq. 6a)"""
    drawn_by = np.array(rows["proposal"].to_pylist())
    names = np.unique(drawn_by).tolist()
    ratios = [np.zeros(rows.num_rows) if n == REFERENCE else rows[f"log_ratio_{n}"].to_numpy() for n in names]
    own = np.stack([drawn_by == name for name in names], axis=1)
    counts = np.repeat(np.add.reduceat(own, starts[:-1], dtype=np.int64), np.diff(starts), axis=0)
    return log_proposal(np.stack(ratios, axis=1), counts.astype(np.float64))
