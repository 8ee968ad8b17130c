"""The report's part about the weights: the tables of fit.json, and the predicted trade-off beside what was decoded.

Every number here comes from the arguments; what they do not hold is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from mpo_ray.evaluation.metrics import Metrics
from mpo_ray.fitting.figures import GAINS, described, fit_figures, other_fits

#: Names of the pictures in the report, where `trade_off` is taken.
PICTURES = {"trade_off": "predicted_trade_off"}
CAPTIONS = {
    "weights": "The weights of the mixture. Bars are intervals.",
    "gap": "How the weights were found. The gap is never below what F(λ) still has to fall.",
    "game": "The game on what is decoded: the weights of each step, and what the objectives gained with them.",
    "balance": "The normalised reward E[ℓ] of each objective under several distributions. Under the optimum of F the "
    "objectives that bind are equal, and no other is below them. Bars are each row's smallest.",
    "predicted_trade_off": "What the scored samples predict for other weights, before anything is decoded, and what "
    "decoding gave.",
}
Table = dict[str, Any]


def fit_pictures(
    fit: Mapping[str, Any],
    trade_off: Mapping[str, Any] | None,
    predicted: Mapping[str, Mapping[str, Any]],
    metrics: Metrics,
) -> dict[str, tuple[Figure, str]]:
    """The pictures of a fit with their captions; every mixture that was decoded is a point on the predicted ones."""
    mixtures = [] if metrics.pareto is None else [p for p in metrics.pareto.points.values() if p.kind == "mixture"]
    found = [(point.weights or {}, point.win_rates) for point in mixtures]
    named = {name: point["weights"] for name, point in predicted.items() if name in metrics.candidates}
    found += [(weights, metrics.candidates[name].win_rates) for name, weights in named.items()]
    # By λ, so that it is one point: the last one, which is a named one (more prompts), and MPO as its λ was fitted.
    decoded = {}
    for weights, rates in found:
        values = {objective: _values(rate) for objective, rate in rates.items()}
        decoded[" ".join(f"{w:.6f}" for w in weights.values())] = {"weights": weights, "win_rates": values}
    pictures = {}
    for name, figure in fit_figures(fit, trade_off, decoded).items():
        title = PICTURES.get(name, name)
        pictures[title] = figure, CAPTIONS["game" if name == "gap" and fit["decoded"] is not None else title]
    return pictures


def fit_section(fit: Mapping[str, Any], predicted: Mapping[str, Mapping[str, Any]], metrics: Metrics) -> dict[str, Any]:
    """What fit_section.html.j2 shows: tables as {"columns", "rows": {name: cells}}, None where there is nothing.

    fit: what fit.json holds
    predicted: candidate → its point of a predicted trade-off (`weights`, `win_rates`, `kl`, …)
    """
    others = other_fits(fit)
    return {
        "weights": weights_table(fit),
        "facts": facts(fit),
        "is_decoded": fit["decoded"] is not None,
        "cautions": list(fit["warnings"]),
        "balance": balance_table(fit),
        "left_out": left_out_table(fit),
        "others": others_table(fit, others) if others else None,
        "other_cautions": [(described(other), text) for other in others.values() for text in other["warnings"]],
        "predictions": predictions_table(predicted, metrics),
    }


def weights_table(fit: Mapping[str, Any]) -> Table:
    """λ and its interval, what the reference has, what the fit gains over it, and whether the objective binds.

    A decoded fit also has the gain that its steps together suggest for the answer, ± a standard error.
    """
    intervals = fit["intervals"]
    percent = [] if intervals is None else [f"{100 * intervals['confidence']:g}\u2009% interval"]
    game = fit["decoded"]
    played = [] if game is None else [f"decoded gain, {GAINS[game['gain']][0]}"]
    columns = ["λ", *percent, "E[ℓ] under π_λ, nats", "under the reference", "gain", *played, "binds"]
    rows = {}
    for name, value in fit["weights"].items():
        bounds = [] if intervals is None else [_bounds(intervals["weights"][name], 3)]
        balance = [fit["balance"][point][name] for point in ("mpo", "reference")]
        gain, binds = [f"{fit['gains'][name]:+z.3f}"], "yes" if name in fit["binding"] else ""
        gain += [] if game is None else [f"{game['gains'][name]:+z.3f} ± {game['standard_errors'][name]:.3f}"]
        rows[name] = [f"{value:z.3f}", *bounds, *(f"{ratio:z.3f}" for ratio in balance), *gain, binds]
    return {"columns": columns, "rows": rows}


def facts(fit: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the weights were found, the certificate, and how many samples speak for them."""
    numbers, size, intervals = fit["samples_per_prompt"], fit["effective_sample_size"], fit["intervals"]
    bounds = None if intervals is None else intervals["objective_value"]
    responses = f"{numbers['max']}" if numbers["min"] == numbers["max"] else f"{numbers['min']} to {numbers['max']}"
    drawn = ", ".join(f"{name} {rows}" for name, rows in fit["proposals"].items())
    found = [
        ("method", str(fit["method"])),
        ("estimator", {"paper": "of the paper", "balanced": "balanced"}[fit["estimator"]]),
        ("β", "" if fit["beta"] is None else f"{fit['beta']:g}"),
        ("F(λ), nats", f"{fit['objective_value']:z.4f}{'' if bounds is None else f' {_bounds(bounds, 4)}'}"),
        ("gap, nats", f"{fit['gap']:.1e}"),
        ("bias of few samples, nats", f"{fit['jackknife_bias']:.1e} (jackknife)"),
        ("samples", f"{fit['num_prompts']} prompts × {responses} responses, drawn by: {drawn}"),
        ("effective sample size", f"median {size['median']:.1f}, min {size['min']:.1f} per prompt"),
    ]
    return [(name, text) for name, text in found if text]


def balance_table(fit: Mapping[str, Any]) -> Table:
    """E[ℓ_k] of every objective under the fit, uniform weights, each policy and the reference, and its minimum."""
    names = list(fit["weights"])
    labels = {"mpo": "this fit", "uniform": "uniform weights", "reference": "reference"}
    rows = {}
    for point in ("mpo", "uniform", *names, "reference"):
        values = [fit["balance"][point][name] for name in names]
        rows[labels.get(point, f"{point} policy")] = [f"{value:z.3f}" for value in (*values, min(values))]
    return {"columns": [*names, "minimum"], "rows": rows}


def left_out_table(fit: Mapping[str, Any]) -> Table | None:
    """The exact fit without each objective: the weights, and what all objectives, that one too, then gain."""
    if not fit["leave_one_out"]:
        return None
    names = list(fit["weights"])
    rows = {
        f"without {left_out}": [
            *("–" if name == left_out else f"{other['weights'][name]:z.3f}" for name in names),
            f"{other['objective_value']:z.4f}",
            *(f"{other['gains'][name]:+z.3f}" for name in names),
        ]
        for left_out, other in fit["leave_one_out"].items()
    }
    return {"columns": _columns(names, "gain"), "rows": rows}


def others_table(fit: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> Table:
    """This fit and the others of the same samples, side by side."""
    names = list(fit["weights"])
    rows = {
        f"{described(one)}{' (this fit)' if one is fit else ''}": [
            *(f"{one['weights'][name]:z.3f}" for name in names),
            f"{one['objective_value']:z.4f}",
            *(f"{one['gains'][name]:+z.3f}" for name in names),
            f"{one['effective_sample_size']['median']:.1f}",
        ]
        for one in (fit, *others.values())
    }
    return {"columns": [*_columns(names, "gain"), "effective sample size"], "rows": rows}


def predictions_table(predicted: Mapping[str, Mapping[str, Any]], metrics: Metrics) -> Table | None:
    """Two rows for each candidate with known weights: what the samples predict of π_λ, and what decoding gave."""
    columns = [*(f"win rate: {name}" for name in metrics.objectives), "minimum", "KL, nats", "tokens"]
    rows = {}
    for name, point in predicted.items():
        if name not in metrics.candidates or "win_rates" not in point:
            continue
        label, decoded = metrics.label(name), metrics.candidates[name]
        rates = [point["win_rates"][objective] for objective in metrics.objectives]
        rows[f"{label}, predicted"] = [
            *map(_estimate, rates),
            f"{min(rate[0] for rate in rates):.2f}",
            _estimate(point["kl"]),
            f"{point['num_tokens'][0]:.1f}" if "num_tokens" in point else "–",
            f"{point['effective_sample_size']:.1f}{'' if point['reliable'] else ' (too small)'}",
        ]
        rows[f"{label}, decoded"] = [
            *(_estimate(_values(decoded.win_rates[objective])) for objective in metrics.objectives),
            _estimate(_values(decoded.minimum_win_rate)),
            _estimate(_values(decoded.kl)),
            f"{decoded.num_tokens:.1f}",
            "",
        ]
    return {"columns": [*columns, "effective sample size"], "rows": rows} if rows else None


def _columns(names: Sequence[str], change: str) -> list[str]:
    return [*(f"λ {name}" for name in names), "F(λ), nats", *(f"{change}: {name}" for name in names)]


def _values(estimate: Any) -> list[float]:
    """[value, low, high], or [value] without an interval."""
    bounds = [] if estimate.low is None else [estimate.low, estimate.high]
    return [estimate.value, *bounds]


def _estimate(values: Sequence[float]) -> str:
    return f"{values[0]:z.2f}" if len(values) == 1 else f"{values[0]:z.2f} {_bounds(values[1:], 2)}"


def _bounds(bounds: Sequence[float], digits: int) -> str:
    return f"[{bounds[0]:z.{digits}f}, {bounds[1]:z.{digits}f}]"
