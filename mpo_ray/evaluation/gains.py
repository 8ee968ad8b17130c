"""What objectives gain under some completions, against the reference's samples of the same prompts (design 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mpo_ray.data.sources import DataError
from mpo_ray.maths.decoded_game import WIN_RATE_PER_DEVIATION
from mpo_ray.maths.statistics import win_probabilities
from mpo_ray.records import REFERENCE

Floats = NDArray[np.float64]
#: (K,) gains and their standard errors over prompts.
Estimates = tuple[Floats, Floats]


class Gains:
    """How much each objective gains under some completions, in one of three units (`kind`).

    win_rate: P(r_k > r_k of the reference) + ½ P(equal) − ½
    reward: (E r_k − E r_k of the reference) / its standard deviation over the reference's samples
    implicit: E ℓ_k, nats; the only kind that needs no samples of the reference
    `unit` is how much of the gain is worth one unit of win rate at parity.
    """

    def __init__(self, scores: pa.Table, objectives: Sequence[str], kind: str) -> None:
        """scores: the score table of a run (design 5.2). Raises DataError where it cannot serve the kind of gain."""
        self._objectives, self._kind = list(objectives), kind
        prefix = "log_ratio_" if kind == "implicit" else "reward_"
        self._columns = [prefix + name for name in objectives]
        for name in ("prompt_id", *self._columns):
            if name not in scores.column_names:
                raise DataError(
                    f"score table: no column {name!r}, which fit.decoded.gain: {kind} needs; its columns are "
                    f"{', '.join(scores.column_names)}."
                )
        self._drawn_by = np.full(scores.num_rows, REFERENCE, dtype=object)
        if "proposal" in scores.column_names:
            self._drawn_by = np.array(scores["proposal"].to_pylist(), dtype=object)
        self._scores = scores.select(["prompt_id", *self._columns])
        reference = self._drawn_by_one(REFERENCE)
        self._reference = self._by_prompt(reference)
        if kind != "implicit" and not self._reference:
            raise DataError(
                f"score table: no samples of the reference, which fit.decoded.gain: {kind} compares with. Set "
                "samples.proposals to all (or reference) and sample again, or set fit.decoded.gain to implicit."
            )
        spread = self._values(reference if reference.num_rows else self._scores).std(axis=0)
        if kind != "win_rate" and not spread.min() > 0:
            column = self._columns[int(spread.argmin())]
            raise DataError(
                f"score table: {column} is the same for all samples; a gain cannot be measured in its standard "
                "deviations. Check the reward, or set fit.decoded.gain to win_rate."
            )
        self._deviations = spread
        deviation = {"reward": 1.0, "implicit": float(spread.max())}
        self.unit = 1.0 if kind == "win_rate" else deviation[kind] / WIN_RATE_PER_DEVIATION

    def of(self, completions: pa.Table) -> Estimates:
        """Gains of completions that have the columns of the score table; prompts count alike, and are the sample."""
        per_prompt = []
        for prompt, values in self._by_prompt(completions).items():
            reference = self._reference.get(prompt)
            if reference is None and self._kind != "implicit":
                raise DataError(f"score table: no samples of the reference for prompt {prompt}; sample again.")
            per_prompt.append(_MEASURES[self._kind](values, reference, self._deviations))
        if len(per_prompt) < 2:
            raise DataError(
                f"gains of {len(per_prompt)} prompt(s): without a second one their error is unknown; set "
                "fit.decoded.num_prompts and samples.num_prompts to 2 or more."
            )
        rows = np.array(per_prompt)
        return rows.mean(axis=0), np.asarray(rows.std(axis=0, ddof=1) / np.sqrt(len(rows)))

    def of_policies(self) -> dict[str, Estimates]:
        """Gains of each policy alone, by its objective, where it drew some of the score table's samples."""
        drawn = {name: self._drawn_by_one(name) for name in self._objectives}
        return {name: self.of(rows) for name, rows in drawn.items() if rows.num_rows}

    def _drawn_by_one(self, proposal: str) -> pa.Table:
        return self._scores.filter(pa.array(self._drawn_by == proposal))

    def _values(self, table: pa.Table) -> Floats:
        return np.stack([table[name].to_numpy().astype(np.float64) for name in self._columns], axis=1)

    def _by_prompt(self, table: pa.Table) -> dict[Any, Floats]:
        """(samples, K) values of each prompt."""
        names, places, counts = np.unique(
            np.array(table["prompt_id"].to_pylist(), dtype=object), return_inverse=True, return_counts=True
        )
        values = self._values(table)[np.argsort(places, kind="stable")]
        return dict(zip(names.tolist(), np.split(values, np.cumsum(counts)[:-1]), strict=True)) if len(names) else {}


def _win_rate(values: Floats, reference: Floats, deviations: Floats) -> Floats:
    return win_probabilities(values.T, reference.T) - 0.5


def _reward(values: Floats, reference: Floats, deviations: Floats) -> Floats:
    return np.asarray((values.mean(axis=0) - reference.mean(axis=0)) / deviations)


def _implicit(values: Floats, reference: Floats | None, deviations: Floats) -> Floats:
    return np.asarray(values.mean(axis=0))


_MEASURES: dict[str, Callable[..., Floats]] = {"win_rate": _win_rate, "reward": _reward, "implicit": _implicit}
