"""When a fit's own answer is not to be trusted: plain sentences, each with what would help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mpo_ray.data.scores import ScoreTable
from mpo_ray.fitting.trade_off import best_minimum, minimum_win_rate
from mpo_ray.maths.fit_uncertainty import ENOUGH, responses_needed

#: Beyond this many responses per prompt, sampling more is not a remedy.
PRACTICAL = 10_000
#: A weight this near 1 is a vertex: the mixture is that policy.
VERTEX = 0.99
#: How far below the best predicted minimum win rate a fit is said to be worse, and how much longer a policy's
#: responses must be than another's for length to decide what decoding does.
WORSE, LONGER = 0.02, 1.5


def warnings(scores: ScoreTable, fit: Mapping[str, Any], trade_off: Mapping[str, Any] | None) -> list[str]:
    """What speaks against a fit on this table. `trade_off`: predictions that begin with the fit's own λ."""
    names = list(scores.objectives)
    weights = np.array([fit["weights"][name] for name in names])
    found = [
        *_few_samples(scores, fit, weights),
        *(_vertex(fit) if fit["method"] != "fixed" else []),
        *_wide_intervals(fit),
    ]
    if trade_off is not None and fit["method"] in ("exact", "bsmd"):
        found += [*_worse_than_predicted(trade_off), *_lengths(trade_off)]
    return found


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
    weights = ", ".join(f"{name} {value:.2f}" for name, value in best["weights"].items())
    return [
        "These weights balance the normalised rewards β ℓ_k, not what the rewards of the run file measure: their "
        f"predicted minimum win rate is {minimum_win_rate(own):.2f}, that of {weights} is "
        f"{minimum_win_rate(best):.2f}. `fit.method: decoded` fits the win rates themselves."
    ]


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
