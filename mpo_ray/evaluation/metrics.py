"""From a table of completions to numbers per candidate: rewards, win rates, their minimum, KL and length (design 2.5).

All candidates are compared on the same prompts, and all intervals come from the same draws of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mpo_ray.evaluation.completions import Resampled, resample
from mpo_ray.evaluation.estimates import Estimate, estimates_from_json
from mpo_ray.evaluation.pareto import Pareto
from mpo_ray.maths.statistics import SignTest, difference_of_minima, minimum_win_rate, sign_test
from mpo_ray.records import FIT_PREFIX, MOPO_PREFIX, MPO, MPO_TOKENWISE, REFERENCE, SOUP_MPO, SOUP_UNIFORM, UNIFORM

Floats = NDArray[np.float64]

LABELS = {
    REFERENCE: "reference",
    UNIFORM: "uniform mixture",
    SOUP_UNIFORM: "uniform soup",
    SOUP_MPO: "soup at MPO's λ",
    MPO_TOKENWISE: "MPO's λ, token by token",
    MPO: "MPO mixture",
}


@dataclass(frozen=True, slots=True)
class CandidateMetrics:
    """What one candidate's completions are worth. Win rates are against the reference; KL is in nats per completion.

    normalized_rewards: (mean − the reference's mean) / standard deviation of the reference's rewards; without an
        objective whose rewards are all equal for the reference
    mpo_minus_this, sign_tests: MPO against this one on the same prompts: difference of the minima, and for each
        objective on how many prompts MPO's mean reward is the higher. None for MPO itself, or without MPO.
    log_z: nats per completion; 0 for a model. Of a mixture that was decoded token by token Σ_t log Z_t, what that drops
        (equation 7); of one that was drawn with particles log Ẑ
    """

    rewards: dict[str, Estimate]
    normalized_rewards: dict[str, Estimate]
    win_rates: dict[str, Estimate]
    minimum_win_rate: Estimate
    mpo_minus_this: Estimate | None
    sign_tests: dict[str, SignTest] | None
    kl: Estimate
    log_z: Estimate
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
    particles: int = 1  # that mixtures were decoded with
    pareto: Pareto | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Metrics:
        candidates = {name: _candidate_from_json(candidate) for name, candidate in value["candidates"].items()}
        pareto = value["pareto"]
        found = None if pareto is None else Pareto.from_json(pareto)
        return cls(**{**value, "candidates": candidates, "pareto": found})

    def label(self, candidate: str) -> str:
        """What a reader calls the candidate."""
        if candidate.startswith(FIT_PREFIX):
            return f"{candidate.removeprefix(FIT_PREFIX)} fit"
        if candidate.startswith(MOPO_PREFIX):
            return f"MOPO {candidate.removeprefix(MOPO_PREFIX)}"
        return LABELS.get(candidate, f"{candidate} policy" if candidate in self.objectives else candidate)


def evaluate_completions(
    table: pa.Table, objectives: Sequence[str], *, draws: int, confidence: float, seed: int, particles: int = 1
) -> Metrics:
    """Compare all candidates of a completions table with the reference, prompt by prompt.

    table: as `completions.resample` has it, which says what is wrong with one that cannot be compared
    particles: that mixtures were decoded with
    """
    found = resample(table, objectives, draws=draws, seed=seed)
    candidates = {name: _candidate(name, found, objectives, confidence) for name in found.cells}
    return Metrics(list(objectives), candidates, len(found.prompts), table.num_rows, confidence, draws, particles)


def _candidate(name: str, found: Resampled, objectives: Sequence[str], confidence: float) -> CandidateMetrics:
    def by_objective(values: tuple[Floats, Floats]) -> dict[str, Estimate]:
        means, draws = values
        return {o: Estimate.over(means[k], draws[:, k], confidence) for k, o in enumerate(objectives)}

    def minima(candidate: str) -> tuple[float, Floats]:
        means, draws = found.wins[candidate]
        return float(minimum_win_rate(means)), minimum_win_rate(draws)

    is_reference = name == REFERENCE  # its win rate against itself is ½ and its KL 0, whatever was sampled
    difference = tests = None
    if MPO in found.cells and name != MPO:
        gap = difference_of_minima(found.wins[MPO][1], found.wins[name][1])
        difference = Estimate.over(minima(MPO)[0] - minima(name)[0], gap, confidence)
        ours, theirs = found.cells[MPO].rewards, found.cells[name].rewards
        tests = {o: sign_test(ours[o].mean(axis=1) - theirs[o].mean(axis=1)) for o in objectives}
    cells = found.cells[name]
    return CandidateMetrics(
        rewards=by_objective(found.rewards[name]),
        normalized_rewards=_normalized(name, found, objectives, confidence),
        win_rates=dict.fromkeys(objectives, Estimate(0.5)) if is_reference else by_objective(found.wins[name]),
        minimum_win_rate=Estimate(0.5) if is_reference else Estimate.over(*minima(name), confidence),
        mpo_minus_this=difference,
        sign_tests=tests,
        kl=Estimate(0.0) if is_reference else Estimate.over(*found.kl[name], confidence),
        log_z=Estimate.over(*found.log_z[name], confidence) if cells.log_z.any() else Estimate(0.0),
        num_tokens=float(cells.num_tokens.mean()),
        finished_share=float(cells.finished.mean()),
    )


def _normalized(name: str, found: Resampled, objectives: Sequence[str], confidence: float) -> dict[str, Estimate]:
    """Rewards in the reference's standard deviations from its mean, both resampled together with the rewards."""
    (ours, our_draws), (theirs, their_draws) = found.rewards[name], found.rewards[REFERENCE]
    std, std_draws = found.reference_std
    known = {o: k for k, o in enumerate(objectives) if std[k] > 0}
    if name == REFERENCE:
        return dict.fromkeys(known, Estimate(0.0))
    return {
        o: Estimate.over(
            float((ours[k] - theirs[k]) / std[k]), (our_draws[:, k] - their_draws[:, k]) / std_draws[:, k], confidence
        )
        for o, k in known.items()
    }


def _candidate_from_json(value: Mapping[str, Any]) -> CandidateMetrics:
    difference, tests = value["mpo_minus_this"], value["sign_tests"]
    return CandidateMetrics(
        rewards=estimates_from_json(value["rewards"]),
        normalized_rewards=estimates_from_json(value["normalized_rewards"]),
        win_rates=estimates_from_json(value["win_rates"]),
        minimum_win_rate=Estimate(**value["minimum_win_rate"]),
        kl=Estimate(**value["kl"]),
        log_z=Estimate(**value["log_z"]),
        mpo_minus_this=None if difference is None else Estimate(**difference),
        sign_tests=None if tests is None else {name: SignTest(**test) for name, test in tests.items()},
        num_tokens=value["num_tokens"],
        finished_share=value["finished_share"],
    )
