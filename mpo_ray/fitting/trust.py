"""When a fit's own answer is not to be trusted: plain sentences, each with what would help."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from math import comb
from typing import Any

import numpy as np

from mpo_ray.data.scores import ScoreTable
from mpo_ray.fitting.trade_off import best_minimum, minimum_win_rate
from mpo_ray.maths.fit_uncertainty import ENOUGH, responses_needed
from mpo_ray.maths.sample_table import SampleTable

#: Beyond this many responses per prompt, sampling more is not a remedy.
PRACTICAL = 10_000
#: A weight this near 1 is a vertex: the mixture is that policy.
VERTEX = 0.99
#: How far below the best predicted minimum win rate a fit is said to be worse, and how much longer a policy's
#: responses must be than another's for length to decide what decoding does.
WORSE, LONGER = 0.02, 1.5
#: A gap of this share of the range of E[ℓ] is far from the optimum.
FAR = 0.1
#: Log-ratios this near to each other, as a share of the largest, are equal.
EQUAL = 1e-12


def warnings(scores: ScoreTable, fit: Mapping[str, Any], trade_off: Mapping[str, Any] | None) -> list[str]:
    """What speaks against a fit on this table. `trade_off`: predictions that begin with the fit's own λ."""
    names = list(scores.objectives)
    weights = np.array([fit["weights"][name] for name in names])
    found = [
        *_nothing_to_choose(scores, fit),
        *_far_from_optimum(fit),
        *_single_prompt(fit),
        *_flat_rewards(scores),
        *_few_samples(scores, fit, weights),
        *(_vertex(fit) if fit["method"] != "fixed" else []),
        *_wide_intervals(fit),
    ]
    if trade_off is not None and fit["method"] in ("exact", "bsmd"):
        found += [*_worse_than_predicted(trade_off), *_lengths(trade_off)]
    return found


def _nothing_to_choose(scores: ScoreTable, fit: Mapping[str, Any]) -> list[str]:
    """Policies that the table does not tell from the reference or from each other."""
    names = list(scores.objectives)
    flat, equal = _flat_and_equal(scores.samples(fit["estimator"]))
    texts = []
    if len(names) > 1 and len(equal) == comb(len(names), 2):
        return [
            "The log-ratios of all objectives are equal: on these responses the policies are one and the same, and "
            "every λ is an optimum. Check that the policies were trained, and that the table holds their log-ratios."
        ]
    for k in flat:
        texts.append(
            f"The log-ratio of {names[k]!r} is the same for all responses of each prompt: on these responses this "
            "policy is the reference, and has nothing to add. Check that it was trained."
        )
    pairs = [(names[i], names[j]) for i, j in equal if fit["method"] != "fixed"]
    if pairs:
        (first, second), more = pairs[0], f" ({len(pairs) - 1} more such pairs)" if len(pairs) > 1 else ""
        texts.append(
            f"The log-ratios of {first!r} and {second!r} are equal{more}: only the sum of their weights is determined, "
            "not how it is shared out. Check that the policies differ, or leave one objective out."
        )
    return texts


def _flat_and_equal(table: SampleTable) -> tuple[list[int], list[tuple[int, int]]]:
    """Which columns do not vary within any prompt, and which pairs of columns are equal, up to rounding."""
    size = table.num_objectives
    flat, equal = set(range(size)), set(combinations(range(size), 2))
    least = EQUAL * max(float(np.abs(table.log_ratios[rows]).max()) for _, rows in table.blocks())
    for prompts, rows in table.blocks():
        log_ratios = np.asarray(table.log_ratios[rows], dtype=np.float64)
        starts = table.starts[prompts] - rows.start
        spread = np.maximum.reduceat(log_ratios, starts) - np.minimum.reduceat(log_ratios, starts)
        flat -= set(np.flatnonzero(spread.max(axis=0) > least).tolist())
        equal = {(i, j) for i, j in equal if np.abs(log_ratios[:, i] - log_ratios[:, j]).max() <= least}
        if not flat and not equal:
            break
    return sorted(flat), sorted(equal)


def _far_from_optimum(fit: Mapping[str, Any]) -> list[str]:
    values = [value for row in fit["balance"].values() for value in row.values()]
    size = max(values) - min(values)
    if fit["method"] not in ("exact", "bsmd") or fit["gap"] <= FAR * size:
        return []
    remedy = (
        f"The steps c/√T are per nat: set fit.bsmd.step_scale near {1 / size:.1g}, or fit.method to exact."
        if fit["method"] == "bsmd"
        else "Look for log-ratios that are wrong."
    )
    return [
        f"The weights are far from the optimum of this table: the gap is {fit['gap']:.2g} nats, where E[ℓ] ranges over "
        f"{size:.2g} nats. {remedy}"
    ]


def _single_prompt(fit: Mapping[str, Any]) -> list[str]:
    if fit["num_prompts"] > 1 or fit["method"] not in ("exact", "bsmd"):
        return []
    return [
        "The table has a single prompt: the weights hold for it alone, and have no interval. Sample more prompts "
        "(samples.num_prompts)."
    ]


def _flat_rewards(scores: ScoreTable) -> list[str]:
    if scores.rewards is None:
        return []
    names = [
        repr(name)
        for k, name in enumerate(scores.objectives)
        if float(scores.rewards[:, k].max()) == float(scores.rewards[:, k].min())
    ]
    if not names:
        return []
    return [
        f"The reward of {' and '.join(names)} is the same for all samples: its win rate is ½ whatever the weights are. "
        "Check the reward of the objective."
    ]


def _few_samples(scores: ScoreTable, fit: Mapping[str, Any], weights: Any) -> list[str]:
    size, estimator = fit["effective_sample_size"]["median"], fit["estimator"]
    if size >= ENOUGH:
        return []
    needed = responses_needed(scores.samples(estimator), weights)
    remedy = (
        f"{needed:,} responses per prompt would do (samples.samples_per_prompt)"
        if needed <= PRACTICAL
        else "no practical number of responses would do"
    )
    other = (
        "; or let the policies draw as well (samples.proposals: all, fit.estimator: balanced)"
        if estimator == "paper"
        else ""
    )
    decided = (
        "single responses decide these weights"
        if fit["method"] in ("exact", "bsmd")
        else "what the table says of these weights (F, E[ℓ], the predictions) rests on single responses"
    )
    return [
        f"The median effective sample size is {size:.1f} of {fit['samples_per_prompt']['max']} responses per prompt: "
        f"{decided}. {remedy[0].upper()}{remedy[1:]}{other}; or keep the policies nearer "
        "the reference (a larger policies.beta)."
    ]


def _vertex(fit: Mapping[str, Any]) -> list[str]:
    name, weight = max(fit["weights"].items(), key=lambda item: item[1])
    if weight < VERTEX or len(fit["weights"]) == 1:
        return []
    return [
        f"The weights are at a vertex: the mixture is the policy {name!r} alone. Its normalised reward is the smallest "
        "even under itself, which is what a fit on too few effective samples, or on policies of very different "
        "strength, looks like. Compare with `fit.method: decoded`."
    ]


def _wide_intervals(fit: Mapping[str, Any]) -> list[str]:
    if fit["intervals"] is None:
        return []
    wide = {name: bounds for name, bounds in fit["intervals"]["weights"].items() if bounds[1] - bounds[0] > 0.5}
    if not wide:
        return []
    name, (low, high) = next(iter(wide.items()))
    return [
        f"The prompts do not determine the weights: the interval of λ {name!r} is [{low:.2f}, {high:.2f}]. Sample more "
        "prompts (samples.num_prompts)."
    ]


def _worse_than_predicted(trade_off: Mapping[str, Any]) -> list[str]:
    best, own = best_minimum(trade_off), trade_off["points"][0]
    if best is None or "win_rates" not in own or minimum_win_rate(own) >= minimum_win_rate(best) - WORSE:
        return []
    if _highest(own) >= _lowest(best):  # the best of a grid is flattered: estimates alone say nothing
        return []
    weights = ", ".join(f"{name} {value:.2f}" for name, value in best["weights"].items())
    return [
        "These weights balance the normalised rewards β ℓ_k, not what the rewards of the run file measure: their "
        f"predicted minimum win rate is {minimum_win_rate(own):.2f} (at most {_highest(own):.2f}), that of {weights} "
        f"is {minimum_win_rate(best):.2f} (at least {_lowest(best):.2f}). `fit.method: decoded` fits the win rates "
        "themselves."
    ]


def _lowest(point: Mapping[str, Any]) -> float:
    """The lower end of a predicted minimum win rate; the estimate where there is no interval."""
    return float(min(value[1] if len(value) > 1 else value[0] for value in point["win_rates"].values()))


def _highest(point: Mapping[str, Any]) -> float:
    return float(min(value[-1] for value in point["win_rates"].values()))


def _lengths(trade_off: Mapping[str, Any]) -> list[str]:
    lengths = {
        max(point["weights"], key=point["weights"].get): point["num_tokens"][0]
        for point in trade_off["points"]
        if "num_tokens" in point and max(point["weights"].values()) == 1.0
    }
    if len(lengths) < 2 or max(lengths.values()) < LONGER * min(lengths.values()):
        return []
    short, long = min(lengths, key=lengths.__getitem__), max(lengths, key=lengths.__getitem__)
    return [
        f"The policies differ in length ({short} {lengths[short]:.0f}, {long} {lengths[long]:.0f} tokens). Such a "
        "policy acts through the end of a response, which a product of next-token distributions cannot foresee: what "
        "is decoded will differ from the mixture that these weights were fitted for. `fit.method: decoded` fits what "
        "is decoded."
    ]
