"""The pictures of a fit: the weights, how they were found, and how they balance the objectives (design 2.2).

An objective has one colour and one marker in all of them. What fit.json does not hold is not drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mpo_ray.drawing import DARK, FIXED, GREY, legend, objective_style, plain, single_axes
from mpo_ray.fitting.table_fit import MPO, REFERENCE, UNIFORM
from mpo_ray.fitting.trade_off_figure import trade_off_figure
from mpo_ray.maths.simplex import Array

#: Colour and marker of the fits that were not chosen.
ALTERNATIVES = {"paper": ("#0072B2", "s"), "balanced": ("#009E73", "^"), "decoded": ("#CC79A7", "D")}
#: What a step of the decoded game gains, by kind of gain, and whether 0 is parity with the reference.
GAINS = {
    "win_rate": ("win rate − ½", True),
    "reward": ("reward over the reference's, in its s.d.", True),
    "implicit": ("E[ℓ], nats", False),
}
#: A trace of more steps than these has a logarithmic axis.
FEW_STEPS = 30


def fit_figures(
    fit: Mapping[str, Any], trade_off: Mapping[str, Any] | None, decoded: Mapping[str, Any] | None = None
) -> dict[str, Figure]:
    """Pictures by name: `weights`, `gap`, `balance`, `trade_off`, as far as there is something to draw.

    fit, trade_off: what fit.json and trade_off.json hold
    decoded: what was really decoded, name → {"weights": {objective: λ}, "win_rates": {objective: [value, low, high]}}
    """
    drawn = {"weights": given_weights_figure(fit) if fit["method"] == "fixed" else weights_figure(fit)}
    if fit["decoded"] is not None:
        drawn["gap"] = game_figure(fit)
    elif fit["trace"] is not None:
        drawn["gap"] = gap_figure(fit)
    drawn["balance"] = balance_figure(fit)
    surface = None if trade_off is None else trade_off_figure(trade_off, decoded or {})
    return drawn if surface is None else drawn | {"trade_off": surface}


def weights_figure(fit: Mapping[str, Any]) -> Figure:
    """The fitted λ, a row for each objective, with its interval; below it, smaller, what other fits found."""
    names = list(fit["weights"])
    others = other_fits(fit)
    figure, axes = single_axes(7.2, 1.5 + (0.36 + 0.13 * len(others)) * len(names))
    places = np.arange(len(names), dtype=np.float64)
    _weights(axes, fit, places, FIXED[MPO][0], "o", 9, f"this fit ({described(fit)})")
    for n, (name, other) in enumerate(others.items(), start=1):
        colour, marker = ALTERNATIVES.get(name, (GREY, "v"))
        _weights(axes, other, places + 0.62 * n / (len(others) + 1), colour, marker, 5.5, described(other))
    axes.axvline(1 / len(names), color=DARK, linewidth=1.0, linestyle=":", label="uniform", zorder=1)
    for place, value in zip(places, _values(fit, names), strict=True):
        axes.text(1.03, place, f"{value:.3f}", va="center", fontsize=9, fontweight="bold")
    _rows(axes, names, places + (0.2 if others else 0.0))
    axes.set_ylim(len(names) - 0.4 + (0.2 if others else 0.0), -0.6)
    axes.set_xlim(-0.02, 1.02)
    bounds = "" if fit["intervals"] is None else f", with {100 * fit['intervals']['confidence']:g} % interval"
    axes.set_xlabel(f"weight λ{bounds}")
    legend(figure, axes)
    return figure


def given_weights_figure(fit: Mapping[str, Any]) -> Figure:
    """Weights that were given and not fitted, as bars."""
    names = list(fit["weights"])
    figure, axes = single_axes(7.2, 0.9 + 0.45 * len(names))
    colours = [objective_style(name, names)[0] for name in names]
    bars = axes.barh(names, _values(fit, names), color=colours, height=0.6)
    axes.bar_label(bars, fmt="%.3f", padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.1)
    axes.set_xlabel("weight λ, as given")
    axes.grid(visible=False, axis="y")
    return figure


def gap_figure(fit: Mapping[str, Any]) -> Figure:
    """How far each step was from the optimum, and λ on the way.

    Above: F(λ) − the lowest F known, and the gap (equation 6), which is never below it; values of 0 are not on a
    logarithmic axis. Below: the answer after each step, and, thin, the iterates of mirror descent.
    """
    trace, names = fit["trace"], list(fit["weights"])
    steps, weights = np.array(trace["steps"]), np.array(trace["weights"])
    best = lowest_objective(fit)
    figure, (above, below) = _two_panels(6.4)
    for values, label, colour, style in (
        (np.array(trace["gap"]), "gap, an upper bound of F(λ) − min F", "#0072B2", "-"),
        (np.array(trace["objective_value"]) - best, "F(λ) − the lowest F known", "#D55E00", "--"),
    ):
        positive = values > 0.0
        above.plot(
            steps[positive], values[positive], style, color=colour, marker="o", markersize=3.5, label=label, zorder=3
        )
    above.set_yscale("log")
    above.set_ylabel("nats")
    above.legend(frameon=False, fontsize=9, loc="best")
    iterates, every = trace.get("iterates"), max(1, len(steps) // 8)
    for k, name in enumerate(names):
        colour, marker = objective_style(name, names)
        if iterates is not None:
            below.plot(steps, np.array(iterates)[:, k], color=colour, linewidth=0.9, alpha=0.5)
        below.plot(
            steps,
            weights[:, k],
            color=colour,
            linewidth=2.0,
            marker=marker,
            markersize=4.5,
            markevery=every,
            label=name,
        )
    if iterates is not None:
        below.set_title("thick: the average, which is the answer; thin: the iterate", fontsize=9, loc="left")
    _steps(above, below, steps, {"exact": "Newton step"}.get(fit["method"], "step"))
    below.set_ylabel("weight λ")
    legend(figure, below)
    return figure


def lowest_objective(fit: Mapping[str, Any]) -> float:
    """The lowest F that is known of the table: of the trace, the answer, and an exact fit of the same estimator."""
    others = (fit.get("alternatives") or {}).values()
    same = [other["objective_value"] for other in others if other["estimator"] == fit["estimator"]]
    return float(min([*fit["trace"]["objective_value"], fit["objective_value"], *same]))


def game_figure(fit: Mapping[str, Any]) -> Figure:
    """The game on what is decoded (equation 6b): λ of each step, and what each objective gained, ± a standard error.

    The diamonds at the right are the answer's weights.
    """
    played, names = fit["decoded"]["steps"], list(fit["weights"])
    steps = np.arange(1, len(played) + 1)
    figure, (above, below) = _two_panels(6.0)
    for k, name in enumerate(names):
        colour, marker = objective_style(name, names)
        lines = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.4}
        above.plot(steps, [step["weights"][name] for step in played], label=name, **lines)
        above.plot(
            [len(played) + 0.6], [fit["weights"][name]], "D", color=colour, markersize=8, markeredgecolor="white"
        )
        below.errorbar(
            steps + 0.08 * (k - (len(names) - 1) / 2),
            [step["gains"][name] for step in played],
            yerr=[step["standard_errors"][name] for step in played],
            elinewidth=1.0,
            **lines,
        )
    above.set_ylabel("weight λ")
    above.set_title("diamonds: the answer", fontsize=9, loc="left")
    unit, is_parity = GAINS[fit["decoded"]["gain"]]
    if is_parity:
        below.axhline(0.0, color=DARK, linewidth=1.0, linestyle=":", zorder=1)
    below.set_ylabel(f"gain: {unit}\n± standard error")
    below.set_xlabel("step")
    below.set_xlim(0.5, len(played) + 1.0)
    below.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend(figure, above)
    return figure


def balance_figure(fit: Mapping[str, Any]) -> Figure:
    """E[ℓ_k] of each objective (nats) under the fit, uniform weights, every policy and the reference.

    At an optimum inside the simplex the dots of the fit lie on one another: the balance that max–min promises. The
    dark bar is each row's smallest value.
    """
    names = list(fit["weights"])
    labels = {MPO: "this fit", UNIFORM: "uniform weights", REFERENCE: "reference"}
    rows = [MPO, UNIFORM, *names, REFERENCE]
    figure, axes = single_axes(7.2, 1.5 + 0.42 * len(rows))
    axes.axhspan(-0.5, 0.5, color="#FBEDE3", zorder=0)
    for place, row in enumerate(rows):
        values = _values({"weights": fit["balance"][row]}, names)
        axes.hlines(place, values.min(), values.max(), color=GREY, linewidth=1.2, zorder=1)
        axes.vlines(values.min(), place - 0.4, place + 0.4, color=DARK, linewidth=2.0, zorder=2)
    offsets = np.linspace(-0.22, 0.22, len(names)) if len(names) > 1 else np.zeros(1)
    for k, name in enumerate(names):
        colour, marker = objective_style(name, names)
        axes.plot(
            [fit["balance"][row][name] for row in rows],
            np.arange(len(rows)) + offsets[k],
            marker,
            color=colour,
            markersize=7.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=name,
            zorder=3,
        )
    _rows(axes, [labels.get(row, f"{row} policy") for row in rows], range(len(rows)))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("E[ℓ], nats, with ℓ = log π_k − log π_ref")
    legend(figure, axes)
    return figure


def other_fits(fit: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The alternatives of a fit that are not what it is itself."""
    others = fit.get("alternatives") or {}
    return {name: other for name, other in others.items() if described(other) != described(fit)}


def described(fit: Mapping[str, Any]) -> str:
    """Method and estimator, as a label."""
    method = str(fit["method"])
    return method if method == "decoded" else f"{method}, {fit['estimator']} estimator"


def _weights(
    axes: Any, fit: Mapping[str, Any], places: Array, colour: str, marker: str, size: float, label: str
) -> None:
    names = list(fit["weights"])
    if fit["intervals"] is not None:
        low, high = np.array([fit["intervals"]["weights"][name] for name in names]).T
        axes.hlines(places, low, high, color=colour, linewidth=0.3 * size, alpha=0.6, zorder=2)
    axes.plot(
        _values(fit, names),
        places,
        marker,
        color=colour,
        markersize=size,
        markeredgecolor="white",
        markeredgewidth=0.6,
        label=label,
        clip_on=False,
        zorder=3,
    )


def _values(fit: Mapping[str, Any], names: Sequence[str]) -> Array:
    return np.array([fit["weights"][name] for name in names], dtype=np.float64)


def _rows(axes: Any, names: Sequence[str], places: Array | range) -> None:
    axes.set_yticks(places, names)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _two_panels(height: float) -> tuple[Figure, tuple[Any, Any]]:
    figure = Figure(figsize=(7.2, height), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    plain(above)
    plain(below)
    return figure, (above, below)


def _steps(above: Any, below: Any, steps: Array, label: str) -> None:
    if steps[-1] > FEW_STEPS:
        above.set_xscale("log")
    else:
        below.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    below.set_xlabel(label)
