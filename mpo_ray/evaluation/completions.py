"""The completions table as arrays: prompts by completions for each candidate, after every check that a mean needs.

Candidates are compared prompt by prompt: all have the same prompts, and equally many completions of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mpo_ray.maths.bounded_means import BoundedMeans, bounded_means
from mpo_ray.maths.statistics import bootstrap_means, win_probabilities
from mpo_ray.records import MPO, REFERENCE, UNIFORM

REWARD = "reward_"

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Cells:
    """One candidate's completions. Arrays are (P, N): N completions of each of P prompts.

    wins: (P, K) win probability against the reference's completions of the same prompt
    """

    rewards: dict[str, Floats]
    wins: Floats
    kl: Floats
    log_z: Floats
    num_tokens: Floats
    finished: Floats

    def are_those_of(self, other: Cells) -> bool:
        """Whether these are the very completions of the other candidate, as of one distribution under two names."""
        numbers = zip(
            [*self.rewards.values(), self.kl, self.log_z, self.num_tokens],
            [*other.rewards.values(), other.kl, other.log_z, other.num_tokens],
            strict=True,
        )
        return all(np.array_equal(ours, theirs) for ours, theirs in numbers)


@dataclass(frozen=True, slots=True)
class Resampled:
    """Every candidate's means over prompts, and the same means over D resampled sets of prompts, equal for all.

    rewards: candidate → (K,) and (D, K); kl, log_z: candidate → its mean and (D,)
    wins: candidate → the means of its win rates with draws of their own, which hold at 0 and 1 (`bounded_means`)
    reference_std: (K,) and (D, K), standard deviation of the reference's rewards over its completions
    """

    cells: dict[str, Cells]
    prompts: NDArray[Any]
    rewards: dict[str, tuple[Floats, Floats]]
    wins: dict[str, BoundedMeans]
    kl: dict[str, tuple[float, Floats]]
    log_z: dict[str, tuple[float, Floats]]
    reference_std: tuple[Floats, Floats]


def resample(table: pa.Table, objectives: Sequence[str], *, draws: int, seed: int) -> Resampled:
    """Means over prompts with their bootstrap draws, for every candidate of a completions table.

    table: one row per completion, with `candidate`, `prompt_id`, `completion_id`, `num_tokens`, `finished`, `kl` and
        `log_z` (nats) and `reward_<objective>`
    Raises ValueError that names the candidate and prompt where something is missing, repeated or not a number.
    """
    cells, prompts = read_cells(table, objectives)
    reference = np.stack([cells[REFERENCE].rewards[name] for name in objectives], axis=2)
    centre = reference.mean(axis=(0, 1))
    # (P, columns): everything that gets an interval, side by side, so that one resampling serves all.
    columns = [_per_prompt(c, objectives) for c in cells.values()]
    values = np.hstack([*columns, np.square(reference - centre).mean(axis=1)])
    means, resampled = values.mean(axis=0), bootstrap_means(values, draws, np.random.default_rng(seed))
    wins = bounded_means(np.hstack([c.wins for c in cells.values()]), draws, np.random.default_rng(seed))
    num, width = len(objectives), columns[0].shape[1]

    def of(start: int, stop: int) -> dict[str, tuple[Floats, Floats]]:
        """The columns from `start` to `stop` of each candidate."""
        places = {name: slice(c * width + start, c * width + stop) for c, name in enumerate(cells)}
        return {name: (means[place], resampled[:, place]) for name, place in places.items()}

    def alone(column: int) -> dict[str, tuple[float, Floats]]:
        return {name: (float(mean[0]), drawn[:, 0]) for name, (mean, drawn) in of(column, column + 1).items()}

    rewards = of(0, num)
    mean, drawn_mean = rewards[REFERENCE]
    std = np.sqrt(np.maximum(means[-num:] - np.square(mean - centre), 0.0))
    drawn_std = np.sqrt(np.maximum(resampled[:, -num:] - np.square(drawn_mean - centre), 0.0))
    drawn_std = np.where(drawn_std > 0, drawn_std, std)  # where a draw holds equal rewards only
    return Resampled(
        cells=cells,
        prompts=prompts,
        rewards=rewards,
        wins={name: wins.columns(c * num, (c + 1) * num) for c, name in enumerate(cells)},
        kl=alone(num),
        log_z=alone(num + 1),
        reference_std=(std, drawn_std),
    )


def read_cells(table: pa.Table, objectives: Sequence[str]) -> tuple[dict[str, Cells], NDArray[Any]]:
    """Every candidate's cells, in the order of the tables, and the prompts' ids (P,)."""
    columns = ["candidate", "prompt_id", "completion_id", "num_tokens", "finished", "kl", "log_z"]
    columns += [REWARD + name for name in objectives]
    absent = [name for name in columns if name not in table.column_names]
    if absent:
        raise ValueError(f"The completions table has no column {absent[0]!r}; it has {', '.join(table.column_names)}.")
    candidates = _ordered(table["candidate"].unique().to_pylist(), objectives)
    table = table.select(columns).sort_by([(name, "ascending") for name in columns[:3]])
    rows = {name: column.to_numpy() for name, column in zip(columns, table.columns, strict=True)}
    prompts = np.unique(rows["prompt_id"][rows["candidate"] == REFERENCE])
    arrays = {c: _arrays(c, {n: v[rows["candidate"] == c] for n, v in rows.items()}, prompts) for c in candidates}
    found = {}
    for name, values in arrays.items():
        rewards = {objective: values[REWARD + objective] for objective in objectives}
        wins = [win_probabilities(r, arrays[REFERENCE][REWARD + objective]) for objective, r in rewards.items()]
        rest = {column: values[column] for column in ("kl", "log_z", "num_tokens", "finished")}
        found[name] = Cells(rewards=rewards, wins=np.stack(wins, axis=1), **rest)
    return found, prompts


def _ordered(present: list[str], objectives: Sequence[str]) -> list[str]:
    """Reference, policies, uniform, the others as they come in the table, MPO."""
    if REFERENCE not in present:
        raise ValueError(
            f"The completions table has no candidate {REFERENCE!r}, which win rates are measured against; it has "
            f"{', '.join(map(str, present)) or 'no rows'}."
        )
    known = [REFERENCE, *objectives, UNIFORM]
    others = [name for name in present if name not in (*known, MPO)]
    return [name for name in [*known, *others, MPO] if name in present]


def _arrays(candidate: str, rows: dict[str, NDArray[Any]], prompts: NDArray[Any]) -> dict[str, Floats]:
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


def _per_prompt(cells: Cells, objectives: Sequence[str]) -> Floats:
    """(P, K + 2): mean reward of each objective, then the mean KL and the mean Σ log Z."""
    rewards = [cells.rewards[name].mean(axis=1) for name in objectives]
    return np.stack([*rewards, cells.kl.mean(axis=1), cells.log_z.mean(axis=1)], axis=1)


def _first(names: NDArray[Any]) -> str:
    return repr(names[0]) if names.size else "none"
