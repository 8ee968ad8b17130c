"""What an evaluation says of MPO, as a sentence: against every single policy, and against the best baseline of all."""

from __future__ import annotations

from dataclasses import dataclass

from mpo_ray.evaluation.estimates import Estimate, written
from mpo_ray.evaluation.metrics import Metrics
from mpo_ray.records import FIT_PREFIX, MPO, MPO_TOKENWISE, REFERENCE


@dataclass(frozen=True, slots=True)
class Verdict:
    """How MPO's minimum win rate compares, and the sentence that says so."""

    kind: str  # against the policies "above", "unresolved" or "below"; against the baselines "at least" or "below"
    sentence: str


def verdict(metrics: Metrics) -> Verdict | None:
    """Say whether MPO's worst objective beats every single policy's, and how sure that is; None without both.

    `above` needs every paired interval of the difference to lie above 0; `below` means that a policy has the higher
    minimum by estimate; the rest is `unresolved`.
    """
    policies = [name for name in metrics.objectives if name in metrics.candidates]
    if MPO not in metrics.candidates or not policies:
        return None
    best = _best(metrics, policies)
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


def baselines(metrics: Metrics) -> list[str]:
    """What MPO is held against: policies, uniform mixture, soups, given mixtures and models.

    Not the reference, whose win rate against itself is ½, not other fits of MPO's weights, and not MPO's own.
    """
    others = (REFERENCE, MPO, MPO_TOKENWISE)
    return [name for name in metrics.candidates if name not in others and not name.startswith(FIT_PREFIX)]


def baseline_verdict(metrics: Metrics) -> Verdict | None:
    """Say whether MPO's worst objective is at least that of the best baseline; None without MPO or a baseline.

    `at least` and `below` go by the estimates; the sentence has the interval of the paired difference.
    """
    names = baselines(metrics)
    if MPO not in metrics.candidates or not names:
        return None
    best = _best(metrics, names)
    ours, theirs = (metrics.candidates[name].minimum_win_rate for name in (MPO, best))
    difference = metrics.candidates[best].mpo_minus_this or Estimate(0.0)
    figures = f"{written(ours)} against {written(theirs)} ({metrics.label(best)}); difference {written(difference, 3)}"
    if difference.value >= 0:
        sure = "which excludes 0" if (difference.low or 0.0) > 0 else "which holds 0"
        return Verdict("at least", f"MPO's minimum win rate is at least every baseline's: {figures}, {sure}.")
    sure = "which excludes 0" if (difference.high or 0.0) < 0 else "which holds 0"
    return Verdict("below", f"MPO's minimum win rate is below the best baseline's: {figures}, {sure}.")


def _best(metrics: Metrics, names: list[str]) -> str:
    return max(names, key=lambda name: metrics.candidates[name].minimum_win_rate.value)
