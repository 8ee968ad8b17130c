"""What a judge's answers amount to: verdicts, outcomes of comparisons in both orders, and win rates. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from mpo_ray.evaluation.estimates import Estimate
from mpo_ray.maths.bounded_means import bounded_means, difference_of_minima, prompts_to_decide
from mpo_ray.records import MPO

#: What one order of a comparison gave. `unparsed`: no verdict in the answer; `refused`: the server refuses the
#: question; `missing`: not asked, as the cost cap was reached.
Reading = Literal["A", "B", "tie", "unparsed", "refused", "missing"]
#: What both orders gave. `first` and `second`: the same position won twice, whoever stood there.
Kind = Literal["win", "loss", "tie", "first", "second", "identical", "unparsed", "refused", "missing"]

VERDICT = re.compile(r"[*_`\s]*verdict\s*:[*_`\s]*(A|B|tie)[*_`\s.]*", re.IGNORECASE)
WORST_FIRST: tuple[Literal["missing", "refused", "unparsed"], ...] = ("missing", "refused", "unparsed")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A comparison in both orders. `score` is the candidate's, from 0 to 1; None where an order has no verdict."""

    kind: Kind
    score: float | None


IDENTICAL = Outcome("identical", 0.5)


@dataclass(frozen=True, slots=True)
class Tally:
    """How often each outcome occurred. `wins` and `losses` have both orders, or one order and a tie, on their side."""

    wins: int = 0
    losses: int = 0
    ties: int = 0
    first: int = 0
    second: int = 0
    identical: int = 0
    unparsed: int = 0
    refused: int = 0
    missing: int = 0

    @property
    def position_bias(self) -> float | None:
        """Share of the comparisons with two verdicts in which the same position won twice: 0 is a judge without it."""
        read = self.wins + self.losses + self.ties + self.first + self.second
        return (self.first + self.second) / read if read else None


@dataclass(frozen=True, slots=True)
class JudgedCandidate:
    """A candidate against the reference: estimates by objective, None where nothing was read."""

    win_rates: dict[str, Estimate | None]
    minimum_win_rate: Estimate | None
    mpo_minus_this: Estimate | None  # paired difference of the minima; None for MPO itself or without MPO
    prompts_to_decide: int | None  # where that interval holds 0, as in `CandidateMetrics`
    tallies: dict[str, Tally]

    def as_json(self) -> dict[str, Any]:
        shares = {name: tally.position_bias for name, tally in self.tallies.items()}
        tallies = {name: {**asdict(tally), "position_bias": shares[name]} for name, tally in self.tallies.items()}
        return {**asdict(self), "tallies": tallies}


def parse_verdict(answer: str) -> Literal["A", "B", "tie"] | None:
    """The verdict that the last line of an answer is, such as `Verdict: A`; None if it is anything else.

    Marks of emphasis around it and capital letters do not matter; a second word does.
    """
    lines = answer.strip().splitlines()
    found = VERDICT.fullmatch(lines[-1]) if lines else None
    if found is None:
        return None
    verdicts: dict[str, Literal["A", "B", "tie"]] = {"a": "A", "b": "B", "tie": "tie"}
    return verdicts[found[1].lower()]


def combine(as_first: Reading, as_second: Reading) -> Outcome:
    """Average the two orders: s = ½ (s(candidate as A) + s(candidate as B)), a tie being ½.

    as_first: what was read with the candidate as response A; as_second: with the candidate as response B
    """
    for kind in WORST_FIRST:
        if kind in (as_first, as_second):
            return Outcome(kind, None)
    score = 0.5 * ({"A": 1.0, "B": 0.0}.get(as_first, 0.5) + {"A": 0.0, "B": 1.0}.get(as_second, 0.5))
    if score == 0.5:
        kinds: dict[str, Kind] = {"A": "first", "B": "second", "tie": "tie"}
        return Outcome(kinds[as_first], score)
    return Outcome("win" if score > 0.5 else "loss", score)


def tally(outcomes: Sequence[Outcome]) -> Tally:
    """Count outcomes by kind."""
    plural = {"win": "wins", "loss": "losses", "tie": "ties"}
    return Tally(**Counter(plural.get(outcome.kind, outcome.kind) for outcome in outcomes))


def judged_candidates(
    outcomes: Mapping[str, Mapping[str, Sequence[Outcome]]], *, draws: int, confidence: float, seed: int
) -> dict[str, JudgedCandidate]:
    """Win rates with intervals over prompts: W_k = mean of the scores of the comparisons that were read.

    outcomes: candidate → objective → one outcome per prompt, over the same P prompts in the same order
    Intervals are those of `bounded_means`, paired over candidates. Comparisons without two verdicts are left out, not
    ties; an objective of which nothing was read has no estimate, nor has then the minimum.
    """
    names = list(outcomes)
    scores = np.array(  # (P, C, K), NaN where an order has no verdict
        [[[np.nan if o.score is None else o.score for o in row] for row in by.values()] for by in outcomes.values()],
        dtype=np.float64,
    ).transpose(2, 0, 1)
    num_prompts, _, size = scores.shape
    flat = scores.reshape(num_prompts, -1)
    drawn = bounded_means(flat, draws, np.random.default_rng(seed), read=np.isfinite(flat))
    means = {name: drawn.columns(c * size, (c + 1) * size) for c, name in enumerate(names)}
    result = {}
    for name, by_objective in outcomes.items():
        own, difference, needed = means[name], None, None
        known = bool(np.isfinite(own.mean).all())
        if MPO in means and name != MPO and known and np.isfinite(means[MPO].mean).all():
            gap = difference_of_minima(means[MPO], own, confidence)
            difference = Estimate.of_difference(gap)
            needed = prompts_to_decide(gap, num_prompts=num_prompts, num_objectives=size, confidence=confidence)
        found = dict(zip(by_objective, Estimate.of_each(own, confidence), strict=True))
        result[name] = JudgedCandidate(
            win_rates={o: e if np.isfinite(e.value) else None for o, e in found.items()},
            minimum_win_rate=Estimate.of_minimum(own, confidence) if known else None,
            mpo_minus_this=difference,
            prompts_to_decide=needed,
            tallies={o: tally(row) for o, row in by_objective.items()},
        )
    return result
