"""The predicted trade-off as a picture: lines for two objectives, the simplex for three, pairs for more.

Points whose effective sample size is too small are grey. What was really decoded is drawn on top. Nothing is
interpolated where the simplex is shown: every dot is one predicted λ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from mpo_ray.drawing import DARK, FIXED, GREY, legend_of, objective_style, pair_panels, plain
from mpo_ray.fitting.trade_off import best_minimum
from mpo_ray.maths.simplex import Array

#: The corners of the simplex of three objectives in the plane, in the order of the objectives.
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])
COLOUR_MAP = "viridis"
FIT_COLOUR, FIT_MARKER = FIXED["mpo"]
KINDS = {"win_rates": "win rate", "rewards": "mean reward"}

Decoded = Mapping[str, Mapping[str, Any]]


def trade_off_figure(trade_off: Mapping[str, Any], decoded: Decoded) -> Figure | None:
    """Win rates over λ, or mean rewards where there are no win rates; None with neither, and for a single objective.

    trade_off: what trade_off.json holds; its first point is the fit's own λ
    decoded: name → {"weights": {objective: λ}, "win_rates": {objective: [value, low, high]}}
    """
    kind = next((kind for kind in KINDS if kind in trade_off["points"][0]), None)
    names = list(trade_off["objectives"])
    if kind is None or len(names) < 2:
        return None
    on_top = decoded if kind == "win_rates" else {}
    if len(names) == 2:
        return line_figure(trade_off, on_top, kind)
    return simplex_figure(trade_off, on_top, kind) if len(names) == 3 else pairs_figure(trade_off, on_top, kind)


def line_figure(trade_off: Mapping[str, Any], decoded: Decoded, kind: str) -> Figure:
    """Two objectives against the weight of the first, with interval bands; rewards have a panel each."""
    names = list(trade_off["objectives"])
    own = trade_off["points"][0]["weights"][names[0]]
    points = sorted(trade_off["points"], key=lambda point: point["weights"][names[0]])
    at = np.array([point["weights"][names[0]] for point in points])
    doubtful = np.array([not point["reliable"] for point in points])
    together = kind == "win_rates"
    best = best_minimum(trade_off) if together else None
    figure = Figure(figsize=(7.2, 4.2 if together else 5.6), layout="constrained")
    panels = figure.subplots(1 if together else 2, 1, squeeze=False, sharex=True)[:, 0].tolist()
    for axes in panels:
        plain(axes)
        axes.axvline(own, color=FIT_COLOUR, linewidth=1.4, linestyle="--", label=f"this fit, λ = {own:.3f}", zorder=2)
        if best is not None:
            highest = best["weights"][names[0]]
            label = f"best predicted minimum, λ = {highest:.3f}"
            axes.axvline(highest, color=DARK, linewidth=1.0, linestyle="-.", label=label, zorder=2)
    if together:
        panels[0].axhline(0.5, color=DARK, linewidth=1.0, linestyle=":", zorder=1)
        panels[0].annotate("reference", (1.0, 0.5), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    for name, axes in zip(names, [*panels, *panels[: 1 if together else 0]], strict=True):
        colour, marker = objective_style(name, names)
        values, low, high = _columns([point[kind][name] for point in points])
        axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(at, values, color=colour, linewidth=1.6, marker=marker, markersize=5, label=f"{name}, predicted")
        axes.plot(at[doubtful], values[doubtful], marker, color=GREY, markersize=5, markeredgecolor=DARK, zorder=4)
        if decoded:
            places = [point["weights"][names[0]] for point in decoded.values()]
            found, below, above = _columns([point["win_rates"][name] for point in decoded.values()])
            axes.errorbar(
                places,
                found,
                yerr=[found - below, above - found],
                marker=marker,
                markersize=9,
                markerfacecolor="white",
                markeredgewidth=1.8,
                color=colour,
                linestyle="none",
                label=f"{name}, decoded",
                zorder=5,
            )
        if not together:
            axes.set_ylabel(f"{KINDS[kind]}: {name}")
    if doubtful.any():
        panels[0].plot([], [], "o", color=GREY, markeredgecolor=DARK, markersize=5, label="too few effective samples")
    if together:
        panels[0].set_ylabel(KINDS[kind])
    panels[-1].set_xlabel(f"weight λ of {names[0]} (of {names[1]}: 1 − λ)")
    _legend_of_all(figure, panels)
    return figure


def simplex_figure(trade_off: Mapping[str, Any], decoded: Decoded, kind: str) -> Figure:
    """Three objectives: a dot for each λ of the simplex, coloured by the predicted minimum win rate.

    A corner is one policy alone, the side opposite a corner has none of it. Decoded points are diamonds in the same
    colours. Where there are no win rates, each objective's mean reward has a simplex of its own.
    """
    names, points = list(trade_off["objectives"]), trade_off["points"]
    places = barycentric(np.array([[point["weights"][name] for name in names] for point in points]))
    reliable = np.array([point["reliable"] for point in points])
    rates = np.array([[point[kind][name][0] for name in names] for point in points])
    panels = {"minimum win rate": rates.min(axis=1)} if kind == "win_rates" else _by_objective(names, rates)
    figure = Figure(figsize=(7.2, 5.9) if len(panels) == 1 else (4.4 * len(panels), 4.2), layout="constrained")
    for axes, (label, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        found = np.array([min(v[0] for v in point["win_rates"].values()) for point in decoded.values()])
        coloured = np.concatenate([values[reliable], found])
        scale = {"vmin": coloured.min(), "vmax": coloured.max()} if coloured.size else {"vmin": 0.0, "vmax": 1.0}
        _frame(axes, names)
        axes.scatter(
            *places[~reliable].T, s=70, c=GREY, marker="x", linewidths=1.4, label="too few effective samples", zorder=2
        )
        dots = axes.scatter(
            *places[reliable].T,
            s=150,
            c=values[reliable],
            cmap=COLOUR_MAP,
            edgecolors=DARK,
            linewidths=0.4,
            label="predicted",
            zorder=2,
            **scale,
        )
        _decoded_on_simplex(axes, decoded, names, found, scale)
        _ring(axes, places[0], FIT_MARKER, FIT_COLOUR, 420, "this fit's λ")
        best = best_minimum(trade_off) if kind == "win_rates" else None
        if best is not None:
            at = barycentric(np.array([[best["weights"][name] for name in names]]))[0]
            _ring(axes, at, "o", "black", 330, "best predicted minimum")
        figure.colorbar(dots, ax=axes, shrink=0.75, label=label)
    _legend_of_all(figure, figure.axes[:1], marker_scale=0.6)
    return figure


def barycentric(weights: Array) -> Array:
    """λ (G, 3) as places (G, 2) in the triangle of CORNERS: Σ_k λ_k corner_k."""
    return np.asarray(weights @ CORNERS)


def pairs_figure(trade_off: Mapping[str, Any], decoded: Decoded, kind: str) -> Figure:
    """More than three objectives: the predicted values of two objectives at a time, a dot for each λ."""
    names, points = list(trade_off["objectives"]), trade_off["points"]
    figure, panels = pair_panels(names, height=3.1)
    reliable = np.array([point["reliable"] for point in points])
    best = best_minimum(trade_off) if kind == "win_rates" else None
    for pair, axes in panels.items():
        places = np.array([[point[kind][name][0] for name in pair] for point in points])
        axes.scatter(*places[~reliable].T, s=12, c=GREY, marker="x", linewidths=0.8, label="too few effective samples")
        axes.scatter(*places[reliable].T, s=12, c="#56B4E9", label="predicted", zorder=2)
        if decoded:
            found = np.array([[point["win_rates"][name][0] for name in pair] for point in decoded.values()])
            axes.scatter(*found.T, s=45, c="#0072B2", marker="D", edgecolors="white", label="decoded", zorder=3)
        axes.scatter(*places[0], s=150, c=FIT_COLOUR, marker=FIT_MARKER, edgecolors="white", label="this fit", zorder=4)
        if best is not None:
            _ring(axes, np.array([best[kind][name][0] for name in pair]), "o", "black", 110, "best predicted minimum")
        axes.set_xlabel(f"{KINDS[kind]}: {pair[0]}")
        axes.set_ylabel(f"{KINDS[kind]}: {pair[1]}")
    _legend_of_all(figure, figure.axes[:1])
    return figure


def _frame(axes: Any, names: Sequence[str]) -> None:
    """The triangle with a name at each corner, and no axes."""
    axes.set_axis_off()
    axes.set_aspect("equal")
    axes.plot(*np.vstack([CORNERS, CORNERS[:1]]).T, color=DARK, linewidth=0.9, zorder=1)
    for name, corner, (x, y), align in zip(
        names, CORNERS, ((0, -16), (0, -16), (0, 26)), ("top", "top", "bottom"), strict=True
    ):
        axes.annotate(
            f"{name} 1",
            corner,
            xytext=(x, y),
            textcoords="offset points",
            ha="center",
            va=align,
            fontsize=10,
            fontweight="bold",
        )
    axes.set_xlim(-0.14, 1.14)
    axes.set_ylim(-0.14, CORNERS[2, 1] + 0.14)


def _decoded_on_simplex(
    axes: Any, decoded: Decoded, names: Sequence[str], found: Array, scale: Mapping[str, float]
) -> None:
    if not decoded:
        return
    places = barycentric(np.array([[p["weights"][name] for name in names] for p in decoded.values()]))
    axes.scatter(
        *places.T,
        s=190,
        c=found,
        cmap=COLOUR_MAP,
        marker="D",
        edgecolors="black",
        linewidths=1.6,
        label="decoded, with its minimum win rate",
        zorder=3,
        **scale,
    )
    for place, value in zip(places, found, strict=True):
        text = axes.annotate(
            f"{value:.2f}", place, xytext=(0, 11), textcoords="offset points", ha="center", fontsize=9, zorder=6
        )
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def _ring(axes: Any, place: Array, marker: str, colour: str, size: float, label: str) -> None:
    axes.scatter(*place, s=size, marker=marker, facecolors="none", edgecolors="white", linewidths=3.6, zorder=4)
    axes.scatter(
        *place, s=size, marker=marker, facecolors="none", edgecolors=colour, linewidths=2.0, label=label, zorder=5
    )


def _by_objective(names: Sequence[str], values: Array) -> dict[str, Array]:
    return {f"mean reward: {name}": column for name, column in zip(names, values.T, strict=True)}


def _columns(estimates: Sequence[Sequence[float]]) -> tuple[Array, Array, Array]:
    """Values and both ends of the intervals, which are the value where there is no interval."""
    whole = np.array([estimate if len(estimate) == 3 else [estimate[0]] * 3 for estimate in estimates])
    return whole[:, 0], np.minimum(whole[:, 1], whole[:, 0]), np.maximum(whole[:, 2], whole[:, 0])


def _legend_of_all(figure: Figure, panels: Sequence[Any], *, marker_scale: float = 1.0) -> None:
    """One legend for what the panels show, each entry once, and none for what no point is drawn of."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if not (hasattr(handle, "get_offsets") and len(handle.get_offsets()) == 0):
                entries.setdefault(label, handle)
    legend_of(figure, entries, marker_scale=marker_scale)
