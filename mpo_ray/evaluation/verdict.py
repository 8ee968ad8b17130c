"""What an evaluation says of MPO's minimum win rate, as sentences: against every other candidate, and against the grid.

A comparison is decided where the interval of the paired difference of the minima leaves 0 out. Nothing is said by
estimates alone. Intervals hold one at a time, not for all candidates together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mpo_ray.evaluation.estimates import Estimate, written
from mpo_ray.evaluation.metrics import Metrics
from mpo_ray.records import FIT_PREFIX, MPO, MPO_TOKENWISE, REFERENCE

Kind = Literal["highest", "undecided", "below"]
#: What a picture or a table says of the verdict in a few words.
SHORT: dict[Kind, str] = {"highest": "MPO is highest", "undecided": "undecided", "below": "MPO is not highest"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """How MPO's minimum win rate compares, and the sentences that say so.

    kind: `highest` where MPO is above every other candidate and every point of the grid, each outside the interval;
        `below` where a candidate is above MPO outside the interval; else `undecided`
    """

    kind: Kind
    sentence: str


def verdict(metrics: Metrics) -> Verdict | None:
    """Compare MPO's minimum win rate with that of all other candidates, by name; None without MPO or another one."""
    others = [name for name in metrics.candidates if name != MPO]
    if MPO not in metrics.candidates or not others:
        return None
    groups: dict[str, list[str]] = {"above": [], "same": [], "open": [], "below": []}
    for name in others:
        groups[_compared(metrics.candidates[name].mpo_minus_this)].append(name)
    grid = None if metrics.pareto is None else metrics.pareto.against_grid
    kind: Kind = "highest"
    if groups["open"] or (grid is not None and grid.undecided + grid.below):
        kind = "undecided"
    if groups["below"]:
        kind = "below"
    sentences = [_headline(metrics, kind)]
    if groups["above"] and kind != "highest":
        sentences.append(f"It is above {_listed([metrics.label(name) for name in groups['above']])}.")
    if groups["below"]:
        sentences.append(f"It is below {_listed([_with_difference(metrics, name) for name in groups['below']])}.")
    if groups["open"]:
        sentences += _undecided(metrics, groups["open"])
    if groups["same"]:
        names = _listed([metrics.label(name) for name in groups["same"]])
        sentences.append(f"The completions of {names} are MPO's own.")
    if kind == "highest":
        next_best = _with_difference(metrics, _best(metrics, groups["above"] or others))
        sentences.append(f"Every paired difference excludes 0. The next is {next_best}.")
    return Verdict(kind, " ".join([*sentences, *_grid_sentences(metrics)]))


def baselines(metrics: Metrics) -> list[str]:
    """What MPO is held against in means over runs: policies, uniform mixture, soups, given mixtures and models.

    Not the reference, whose win rate against itself is ½, not other fits of MPO's weights, and not MPO's own.
    """
    others = (REFERENCE, MPO, MPO_TOKENWISE)
    return [name for name in metrics.candidates if name not in others and not name.startswith(FIT_PREFIX)]


def needed(prompts: int | None) -> str:
    """How many prompts would decide, in words."""
    return (
        "no practical number of prompts would decide" if prompts is None else f"about {prompts:,} prompts would decide"
    )


def _compared(difference: Estimate | None) -> str:
    """Where MPO stands, outside the interval of the difference: `above`, `below` or `open`; `same` by definition."""
    if difference is None or difference.low is None or difference.high is None:
        return "same"
    if difference.low > 0.0:
        return "above"
    return "below" if difference.high < 0.0 else "open"


def _headline(metrics: Metrics, kind: Kind) -> str:
    own = f"MPO's minimum win rate, {written(metrics.candidates[MPO].minimum_win_rate)},"
    num = len(metrics.candidates)
    percent = f"({100 * metrics.confidence:g} % intervals, {metrics.num_prompts} prompts)"
    return {
        "highest": f"{own} is the highest of all {num} candidates {percent}.",
        "undecided": f"Undecided: whether {own} is the highest of all {num} candidates {percent}.",
        "below": f"{own} is not the highest of all {num} candidates {percent}.",
    }[kind]


def _undecided(metrics: Metrics, names: Sequence[str]) -> list[str]:
    """Whom the intervals do not tell from MPO, the one of them with the highest estimate, and what would decide."""
    best = _best(metrics, names)
    told = f"{_with_difference(metrics, best)}; {needed(metrics.candidates[best].prompts_to_decide)}."
    if len(names) == 1:
        return [f"The paired difference holds 0 against {told}"]
    listed = _listed([metrics.label(name) for name in names])
    return [f"The paired difference holds 0 against {listed}.", f"The highest of these by estimate is {told}"]


def _best(metrics: Metrics, names: Sequence[str]) -> str:
    return max(names, key=lambda name: metrics.candidates[name].minimum_win_rate.value)


def _with_difference(metrics: Metrics, name: str) -> str:
    candidate = metrics.candidates[name]
    if candidate.mpo_minus_this is None:
        return metrics.label(name)
    gap = written(candidate.mpo_minus_this, 3)
    return f"{metrics.label(name)} ({written(candidate.minimum_win_rate)}, MPO − this {gap})"


def _grid_sentences(metrics: Metrics) -> list[str]:
    """Where MPO stands on the grid; nothing without one."""
    if metrics.pareto is None or metrics.pareto.against_grid is None:
        return []
    grid, point = metrics.pareto.against_grid, metrics.pareto.points[metrics.pareto.against_grid.best]
    total = grid.above + grid.undecided + grid.below
    where = f"Of the {total} other points of the grid ({metrics.pareto.num_prompts} prompts)"
    counts = f"{where}, it is above {grid.above}, below {grid.below}, and undecided against {grid.undecided}."
    if grid.above == total:
        return [counts]
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in (point.weights or {}).items())
    more = f"; {needed(grid.prompts_to_decide)}" if grid.mpo_minus_best.holds_zero else ""
    return [
        counts,
        f"The best of them by estimate is the {point.kind} {weights} ({written(grid.minimum)}, MPO − this "
        f"{written(grid.mpo_minus_best, 3)}{more}); the best of many estimates is flattered.",
    ]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
