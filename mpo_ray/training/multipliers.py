"""What the loop of MOPO carries from one optimiser step to the next: λ, χ and the bounds (design 2.4, eqs. 10, 12, 13).

λ and χ of a step come from the statistics of the steps before it: all prompts of one optimiser step are weighed with
the same λ, on every worker and in every forward pass, and one average over the workers per step is enough.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpo_ray.config_training import ConstrainedTraining
from mpo_ray.maths.constrained import RunawayError, barrier_step, multiplier_step, scheduled_bounds
from mpo_ray.maths.robust import chi_step, dual_at
from mpo_ray.maths.simplex import Array
from mpo_ray.training.constrained import Problem, Statistics

#: Steps over which what is shown, checked and made a bound is averaged: a batch's own values are noisy.
AVERAGED = 50
#: A multiplier beyond this has run away: what is maximised is less than a hundredth of ρ's exponent.
RUNAWAY = 100.0
#: Slack below which the barrier goes on linearly, in units of win probability.
DELTA = 1e-3
#: Standard deviation of ρ q̄ from which χ begins, at the χ* = sd/√(2ε) of a small radius.
SPREAD = 0.25


@dataclass(frozen=True, slots=True, eq=False)
class Multipliers:
    """The state of the loop, the same on every worker.

    multipliers: (J,) λ; log_chi: (J,) log χ, units of win probability; bounds: (J,) b
    averages: primary, effective share, KL and the J constraints' values G, over the last steps; None before the first
    waiting: (J,) G at the last turn of the lag, which a bound takes up at the next one; None before the first
    """

    multipliers: Array
    log_chi: Array
    bounds: Array
    averages: Array | None = None
    waiting: Array | None = None

    @classmethod
    def start(cls, problem: Problem) -> Multipliers:
        """λ = 0."""
        size = len(problem.bounds)
        chi = SPREAD / np.sqrt(2 * problem.radius) if problem.radius > 0 else 1.0
        return cls(np.zeros(size), np.full(size, np.log(chi)), np.array(problem.bounds))

    def observe(self, found: Statistics, values: Array, *, step: int, lag: int | None) -> Multipliers:
        """Take up what a step, the `step`-th from 1, saw. values: (J,) the constraints' G."""
        new = np.concatenate([[found.primary, found.effective_share, found.kl], values])
        span = min(step, AVERAGED, lag or AVERAGED)
        return replace(self, averages=new if self.averages is None else self.averages + (new - self.averages) / span)

    def after(self, found: Statistics, problem: Problem, training: ConstrainedTraining, *, step: int) -> Multipliers:
        """λ, χ and, every t0 steps, the bounds after the `step`-th step   (design 2.4, eqs. 10, 12, 13)

        found: means over all prompts of the step, at this λ and χ. Raises RunawayError.
        """
        duals = [dual_at(m, problem.radius, chi) for m, chi in zip(found.moments, self.log_chi, strict=True)]
        robust = problem.radius > 0
        values = np.array([value for value, _ in duals]) if robust else found.values
        seen = self.observe(found, values, step=step, lag=training.lag)
        if problem.variant == "lagrangian":
            multipliers = multiplier_step(self.multipliers, values, self.bounds, training.multiplier_step)
        else:
            multipliers = barrier_step(
                self.multipliers, values, self.bounds, training.multiplier_step, sigma=problem.sigma, delta=DELTA
            )
        if multipliers.max(initial=0.0) > RUNAWAY:
            which = int(multipliers.argmax())
            raise RunawayError(which, float(multipliers[which]), problem.secondary[which])
        chis = [
            chi_step(chi, kl, problem.radius, training.chi_step)
            for chi, (_, kl) in zip(self.log_chi, duals, strict=True)
            if robust
        ]
        moved = replace(seen, multipliers=multipliers, log_chi=np.array(chis) if robust else self.log_chi)
        return moved.turned(problem, training.relaxation) if training.lag and step % training.lag == 0 else moved

    def turned(self, problem: Problem, relaxation: float) -> Multipliers:
        """Adaptive bounds become `relaxation` times G of the last turn, t0 steps ago   (design 2.4, eq. 13)"""
        bounds = self.bounds
        if self.waiting is not None:
            bounds = np.where(problem.adaptive, scheduled_bounds(self.waiting, relaxation), bounds)
        return replace(self, bounds=bounds, waiting=self.values)

    @property
    def values(self) -> Array:
        """(J,) G, averaged over the last steps."""
        assert self.averages is not None
        return self.averages[3:]

    @property
    def effective_share(self) -> float:
        assert self.averages is not None
        return float(self.averages[1])

    def as_json(self) -> dict[str, Any]:
        arrays = {name: getattr(self, name) for name in self.__slots__}
        return {name: None if array is None else array.tolist() for name, array in arrays.items()}

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> Multipliers:
        arrays: dict[str, Any] = {name: None if row is None else np.array(row) for name, row in values.items()}
        return cls(**arrays)


class DegenerateRatioError(ValueError):
    """ρ rests on so few candidates that the policy would learn single responses by heart.

    step: where; share: effective sample size as a share of the candidates; least: what was asked for
    """

    def __init__(self, step: int, share: float, least: float) -> None:
        super().__init__(step, share, least)
        self.step, self.share, self.least = step, share, least

    def __str__(self) -> str:
        return (
            f"step {self.step}: ρ rests on {self.share:.1%} of its candidates (mean effective sample size over the "
            f"prompts), fewer than least_effective_share = {self.least:.1%}, so the policy would only copy them. Raise "
            "tau, lower the bounds or the radius, or add candidates; with a lag, make it longer or keep the reference "
            "(lag: null)."
        )


def check_ratio(state: Multipliers, *, step: int, least: float) -> None:
    """Stop where ρ, over the last steps, is nearly one-hot (design 2.4, trap 2). Raises DegenerateRatioError."""
    if state.effective_share < least:
        raise DegenerateRatioError(step, state.effective_share, least)
