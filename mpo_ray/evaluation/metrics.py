"""From a table of completions to numbers per candidate: rewards, win rates, their minimum, KL and length (design 2.5).

Candidates are the reference, one policy per objective (named as the objective), and token-level mixtures of the
policies, `uniform` and `mpo`. All are compared on the same prompts, and all intervals come from the same draws of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mpo_ray.maths.statistics import (
    bootstrap_means,
    difference_of_minima,
    interval,
    minimum_win_rate,
    win_probabilities,
)
from mpo_ray.records import REFERENCE

UNIFORM = "uniform"
MPO = "mpo"
REWARD = "reward_"

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts with its bootstrap interval; no interval where the value holds by definition."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def half_width(self) -> float:
        """Half of the interval's width; 0 without an interval."""
        return 0.0 if self.low is None or self.high is None else (self.high - self.low) / 2.0


@dataclass(frozen=True, slots=True)
class CandidateMetrics:
    """What one candidate's completions are worth. Win rates are against the reference; KL is in nats per completion."""

    rewards: dict[str, Estimate]
    win_rates: dict[str, Estimate]
    minimum_win_rate: Estimate
    mpo_minus_this: Estimate | None  # paired difference of the minima; None for MPO itself or without MPO
    kl: Estimate
    num_tokens: float
    finished_share: float


@dataclass(frozen=True, slots=True)
class Metrics:
    """An evaluation: candidates in the order reference, policies, uniform, others, MPO."""

    objectives: list[str]
    candidates: dict[str, CandidateMetrics]
    num_prompts: int
    num_completions: int  # over all candidates
    confidence: float
    draws: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Metrics:
        candidates = {name: _candidate_from_json(candidate) for name, candidate in value["candidates"].items()}
        return cls(**{**value, "candidates": candidates})

    def label(self, candidate: str) -> str:
        """What a reader calls the candidate."""
        names = {REFERENCE: "reference", UNIFORM: "uniform mixture", MPO: "MPO mixture"}
        return names.get(candidate, f"{candidate} policy" if candidate in self.objectives else candidate)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether MPO's minimum win rate is above that of every single policy, and the sentence that says so."""

    kind: str  # "above", "unresolved" or "below"
    sentence: str


def evaluate_completions(
    table: pa.Table, objectives: Sequence[str], *, draws: int, confidence: float, seed: int
) -> Metrics:
    """Compare all candidates of a completions table with the reference, prompt by prompt.

    table: one row per completion, with `candidate`, `prompt_id`, `completion_id`, `num_tokens`, `finished`, `kl` (nats)
        and `reward_<objective>`. Every candidate has the same prompts, and equally many completions of each.
    Raises ValueError that names the candidate and prompt where something is missing, repeated or not a number.
    """
    columns = ["candidate", "prompt_id", "completion_id", "num_tokens", "finished", "kl"]
    columns += [REWARD + name for name in objectives]
    absent = [name for name in columns if name not in table.column_names]
    if absent:
        raise ValueError(f"The completions table has no column {absent[0]!r}; it has {', '.join(table.column_names)}.")
    table = table.select(columns).sort_by([(name, "ascending") for name in columns[:3]])
    rows = {name: column.to_numpy() for name, column in zip(columns, table.columns, strict=True)}
    candidates = _ordered(rows["candidate"], objectives)
    prompts = np.unique(rows["prompt_id"][rows["candidate"] == REFERENCE])
    cells = {c: _cells(c, {n: v[rows["candidate"] == c] for n, v in rows.items()}, prompts) for c in candidates}

    # (P, columns): everything that gets an interval, side by side, so that one resampling serves all.
    num_objectives = len(objectives)
    values = np.hstack([_per_prompt(cells[c], cells[REFERENCE], objectives) for c in candidates])
    means = values.mean(axis=0).reshape(len(candidates), 2 * num_objectives + 1)
    resampled = bootstrap_means(values, draws, np.random.default_rng(seed)).reshape(draws, *means.shape)

    def estimate(value: float, over_draws: Floats) -> Estimate:
        return Estimate(float(value), *interval(over_draws, confidence))

    mpo = candidates.index(MPO) if MPO in candidates else None
    wins = slice(num_objectives, 2 * num_objectives)
    result = {}
    for c, name in enumerate(candidates):
        minimum, minimum_draws = means[c, wins].min(), minimum_win_rate(resampled[:, c, wins])
        is_reference = name == REFERENCE  # its win rate against itself is ½ and its KL 0, whatever was sampled
        difference = None
        if mpo is not None and mpo != c:
            gap_draws = difference_of_minima(resampled[:, mpo, wins], resampled[:, c, wins])
            difference = estimate(means[mpo, wins].min() - minimum, gap_draws)
        result[name] = CandidateMetrics(
            rewards={o: estimate(means[c, k], resampled[:, c, k]) for k, o in enumerate(objectives)},
            win_rates={
                o: Estimate(0.5) if is_reference else estimate(means[c, k], resampled[:, c, k])
                for k, o in enumerate(objectives, start=num_objectives)
            },
            minimum_win_rate=Estimate(0.5) if is_reference else estimate(minimum, minimum_draws),
            mpo_minus_this=difference,
            kl=Estimate(0.0) if is_reference else estimate(means[c, -1], resampled[:, c, -1]),
            num_tokens=float(cells[name]["num_tokens"].mean()),
            finished_share=float(cells[name]["finished"].mean()),
        )
    return Metrics(list(objectives), result, len(prompts), table.num_rows, confidence, draws)


def verdict(metrics: Metrics) -> Verdict | None:
    """Say whether MPO's worst objective beats every single policy's, and how sure that is; None without both.

    `above` needs every paired interval of the difference to lie above 0; `below` means that a policy has the higher
    minimum by estimate; the rest is `unresolved`.
    """
    policies = [name for name in metrics.objectives if name in metrics.candidates]
    if MPO not in metrics.candidates or not policies:
        return None
    best = max(policies, key=lambda name: metrics.candidates[name].minimum_win_rate.value)
    ours, theirs = (metrics.candidates[name].minimum_win_rate for name in (MPO, best))
    differences = {name: metrics.candidates[name].mpo_minus_this or Estimate(0.0) for name in policies}
    figures = (
        f"{written(ours)} against {written(theirs)} for the best single policy, {best!r} "
        f"({100 * metrics.confidence:g} % intervals)"
    )
    within = [name for name, gap in differences.items() if (gap.low or 0.0) <= 0.0]
    if ours.value <= theirs.value:
        return Verdict("below", f"MPO's minimum win rate is not above every single policy's: {figures}.")
    if within:
        names = " and ".join(repr(name) for name in within)
        return Verdict(
            "unresolved",
            f"MPO's minimum win rate is the highest by estimate, but not outside the intervals: {figures}; the paired "
            f"difference from {names} may be 0.",
        )
    highs = [metrics.candidates[name].minimum_win_rate.high or 0.0 for name in policies]
    apart = "no interval overlaps MPO's" if (ours.low or 0.0) > max(highs) else "the separate intervals overlap"
    return Verdict(
        "above",
        f"MPO's minimum win rate is above every single policy's, outside the intervals: {figures}; every paired "
        f"difference excludes 0, and {apart}.",
    )


def written(estimate: Estimate, digits: int = 2) -> str:
    """The estimate and its interval, as `0.56 [0.52, 0.60]`."""
    if estimate.low is None or estimate.high is None:
        return number(estimate.value, digits)
    return f"{number(estimate.value, digits)} [{number(estimate.low, digits)}, {number(estimate.high, digits)}]"


def number(value: float, digits: int = 2) -> str:
    """The value with fixed digits, and no sign where it rounds to 0."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _ordered(names: NDArray[Any], objectives: Sequence[str]) -> list[str]:
    present = dict.fromkeys(names.tolist())
    if REFERENCE not in present:
        raise ValueError(
            f"The completions table has no candidate {REFERENCE!r}, which win rates are measured against; it has "
            f"{', '.join(map(str, present)) or 'no rows'}."
        )
    known = [REFERENCE, *objectives, UNIFORM]
    others = [name for name in present if name not in (*known, MPO)]
    return [name for name in [*known, *others, MPO] if name in present]


def _cells(candidate: str, rows: dict[str, NDArray[Any]], prompts: NDArray[Any]) -> dict[str, Floats]:
    """One candidate's sorted rows as arrays (P, N), after every check that a mean over them needs."""
    found, counts = np.unique(rows["prompt_id"], return_counts=True)
    missing, extra = np.setdiff1d(prompts, found), np.setdiff1d(found, prompts)
    if missing.size or extra.size:
        raise ValueError(
            f"Candidate {candidate!r} has {found.size} of the reference's {prompts.size} prompts: {missing.size} "
            f"missing (first {_first(missing)}), {extra.size} that the reference lacks (first {_first(extra)}). Win "
            "rates compare completions of the same prompts; repeat the evaluation's generation."
        )
    if counts.min() != counts.max():
        few, many = found[counts.argmin()], found[counts.argmax()]
        raise ValueError(
            f"Candidate {candidate!r} has {counts.min()} completion(s) of prompt {few!r} and {counts.max()} of "
            f"{many!r}; every prompt needs equally many. Repeat the evaluation's generation."
        )
    keys = rows["completion_id"].reshape(prompts.size, -1)
    repeated = np.argwhere(keys[:, 1:] == keys[:, :-1])
    if repeated.size:
        p, n = repeated[0]
        raise ValueError(
            f"Candidate {candidate!r} has completion {keys[p, n]} of prompt {prompts[p]!r} more than once; every "
            "(candidate, prompt_id, completion_id) is one row."
        )
    numbers = {name: v.astype(np.float64) for name, v in rows.items() if name not in ("candidate", "prompt_id")}
    for name, column in numbers.items():
        bad = np.flatnonzero(~np.isfinite(column))
        if bad.size:
            what = f"reward of objective {name.removeprefix(REWARD)!r}" if name.startswith(REWARD) else name
            raise ValueError(
                f"Candidate {candidate!r}, prompt {rows['prompt_id'][bad[0]]!r}, completion "
                f"{rows['completion_id'][bad[0]]}: the {what} is {column[bad[0]]} ({bad.size} such row(s)). Every "
                "completion needs a finite value; check the function or model that gave it."
            )
    return {name: column.reshape(prompts.size, -1) for name, column in numbers.items()}


def _per_prompt(cells: dict[str, Floats], reference: dict[str, Floats], objectives: Sequence[str]) -> Floats:
    """(P, 2K + 1): mean reward and win probability of each objective, then the mean KL."""
    rewards = [cells[REWARD + name].mean(axis=1) for name in objectives]
    wins = [win_probabilities(cells[REWARD + name], reference[REWARD + name]) for name in objectives]
    return np.stack([*rewards, *wins, cells["kl"].mean(axis=1)], axis=1)


def _first(names: NDArray[Any]) -> str:
    return repr(names[0]) if names.size else "none"


def _candidate_from_json(value: Mapping[str, Any]) -> CandidateMetrics:
    def by_objective(estimates: Mapping[str, Any]) -> dict[str, Estimate]:
        return {name: Estimate(**estimate) for name, estimate in estimates.items()}

    difference = value["mpo_minus_this"]
    return CandidateMetrics(
        rewards=by_objective(value["rewards"]),
        win_rates=by_objective(value["win_rates"]),
        minimum_win_rate=Estimate(**value["minimum_win_rate"]),
        mpo_minus_this=None if difference is None else Estimate(**difference),
        kl=Estimate(**value["kl"]),
        num_tokens=value["num_tokens"],
        finished_share=value["finished_share"],
    )
