"""From a table of completions to numbers per candidate: rewards, win rates, their minimum, KL and length (design 2.5).

All candidates are compared on the same prompts, and all intervals come from the same draws of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mpo_ray.evaluation.completions import Resampled, resample
from mpo_ray.evaluation.estimates import Estimate, estimates_from_json
from mpo_ray.evaluation.pareto import Pareto
from mpo_ray.maths.bounded_means import difference_of_minima, fixed_means, prompts_to_decide
from mpo_ray.maths.statistics import SignTest, sign_test
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
        objective on how many prompts MPO's mean reward is the higher. None for MPO itself, or without MPO. The
        difference has no interval where both have the same completions.
    prompts_to_decide: where that difference's interval holds 0, the number of prompts that would decide
        (`bounded_means.prompts_to_decide`); None if no practical number would
    rows_per_token: cost; how many model rows a decoded token needs, 1 for a policy, K for a mixture of K; None if
        unknown
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
    prompts_to_decide: int | None = None
    rows_per_token: int | None = None

    @property
    def cut_share(self) -> float:
        """Share of the completions that were cut at the limit."""
        return 1.0 - self.finished_share


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
    table: pa.Table,
    objectives: Sequence[str],
    *,
    draws: int,
    confidence: float,
    seed: int,
    particles: int = 1,
    rows_per_token: Mapping[str, int] | None = None,
) -> Metrics:
    """Compare all candidates of a completions table with the reference, prompt by prompt.

    table: as `completions.resample` has it, which says what is wrong with one that cannot be compared
    particles: that mixtures were decoded with; rows_per_token: candidate → its cost, where it is known
    """
    found = resample(table, objectives, draws=draws, seed=seed)
    costs = rows_per_token or {}
    candidates = {
        name: replace(_candidate(name, found, objectives, confidence), rows_per_token=costs.get(name))
        for name in found.cells
    }
    return Metrics(list(objectives), candidates, len(found.prompts), table.num_rows, confidence, draws, particles)


def _candidate(name: str, found: Resampled, objectives: Sequence[str], confidence: float) -> CandidateMetrics:
    def by_objective(values: tuple[Floats, Floats]) -> dict[str, Estimate]:
        means, draws = values
        return {o: Estimate.over(means[k], draws[:, k], confidence) for k, o in enumerate(objectives)}

    is_reference = name == REFERENCE  # its win rate against itself is ½ and its KL 0, whatever was sampled
    difference = tests = needed = None
    cells, wins = found.cells[name], found.wins[name]
    wins = fixed_means(0.5, wins) if is_reference else wins
    if MPO in found.cells and name != MPO:
        size = {"num_prompts": len(found.prompts), "num_objectives": len(objectives)}
        gap = difference_of_minima(found.wins[MPO], wins, confidence)
        same = found.cells[MPO].are_those_of(cells)
        difference = Estimate(0.0) if same else Estimate.of_difference(gap)
        needed = None if same else prompts_to_decide(gap, **size, confidence=confidence)
        ours, theirs = found.cells[MPO].rewards, cells.rewards
        tests = {o: sign_test(ours[o].mean(axis=1) - theirs[o].mean(axis=1)) for o in objectives}
    return CandidateMetrics(
        rewards=by_objective(found.rewards[name]),
        normalized_rewards=_normalized(name, found, objectives, confidence),
        win_rates=dict.fromkeys(objectives, Estimate(0.5))
        if is_reference
        else dict(zip(objectives, Estimate.of_each(wins, confidence), strict=True)),
        minimum_win_rate=Estimate(0.5) if is_reference else Estimate.of_minimum(wins, confidence),
        mpo_minus_this=difference,
        prompts_to_decide=needed,
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
        prompts_to_decide=value.get("prompts_to_decide"),
        rows_per_token=value.get("rows_per_token"),
    )
