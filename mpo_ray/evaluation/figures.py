"""The report's pictures. A candidate has one colour and one marker in all of them; a policy's is its objective's.

A soup has the colour and marker of the mixture at the same weights, and is drawn hollow.

The colours are told apart by readers with the common forms of colour blindness (Okabe and Ito's palette).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mpo_ray.drawing import COLOURS, FIXED, MARKERS, legend, pair_panels, single_axes
from mpo_ray.evaluation.estimates import Estimate
from mpo_ray.evaluation.metrics import Metrics
from mpo_ray.evaluation.pareto import Pareto, nondominated
from mpo_ray.evaluation.verdict import SHORT, verdict
from mpo_ray.records import GRID_PREFIX, MOPO_PREFIX, MPO, REFERENCE, SOUP_MPO, SOUP_UNIFORM

Floats = NDArray[np.float64]

HOLLOW = (SOUP_UNIFORM, SOUP_MPO)


#: How the points of a grid are drawn, by kind: label, colour, marker, line, fill.
FAMILIES = {
    "mixture": ("mixtures, grid of λ", "#D55E00", "o", "-", "#D55E00"),
    "soup": ("soups, grid of λ", "#444444", "s", "--", "white"),
}
#: Policies of MOPO from which on they are one family in the pictures, not candidates by name.
MANY = 3


def shown(metrics: Metrics) -> list[str]:
    """The candidates that are drawn by name: all, or all but a sweep of MOPO's policies."""
    sweep = [name for name in metrics.candidates if name.startswith(MOPO_PREFIX)]
    return [name for name in metrics.candidates if len(sweep) < MANY or name not in sweep]


def style(candidate: str, objectives: Sequence[str], others: Sequence[str] = ()) -> tuple[str, str]:
    """Colour and marker of a candidate, the same in every picture; `others` are those that are no policy."""
    if candidate in FIXED:
        return FIXED[candidate]
    names = [*objectives, *(name for name in others if name not in objectives and name not in FIXED)]
    number = names.index(candidate) if candidate in names else len(names)
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def win_rate_figure(metrics: Metrics) -> Figure:
    """Win rates against the reference with intervals, grouped by objective; last the minimum, with the verdict."""
    names = [name for name in shown(metrics) if name != REFERENCE]
    found = verdict(metrics)
    groups = [*metrics.objectives, "minimum" if found is None else f"minimum\n({SHORT[found.kind]})"]
    figure, axes = single_axes(max(7.2, (0.6 + 0.22 * len(names)) * len(groups)), 3.9)
    width = 0.8 / len(names)
    axes.axvspan(len(groups) - 1.5, len(groups) - 0.5, color="#F1EEE8", zorder=0)
    for n, name in enumerate(names):
        candidate = metrics.candidates[name]
        estimates = [*(candidate.win_rates[o] for o in metrics.objectives), candidate.minimum_win_rate]
        places = np.arange(len(groups)) + (n - (len(names) - 1) / 2) * width
        colour = style(name, metrics.objectives, list(metrics.candidates))[0]
        axes.bar(
            places,
            [e.value for e in estimates],
            0.9 * width,
            yerr=_bars(estimates),
            color="white" if name in HOLLOW else colour,
            edgecolor=colour,
            hatch="/////" if name in HOLLOW else None,
            error_kw={"elinewidth": 1.1, "ecolor": "#333333", "capsize": 2.0},
            label=metrics.label(name),
            zorder=2,
        )
    axes.axhline(0.5, color="#333333", linewidth=1.0, linestyle="--", zorder=3)
    axes.text(len(groups) - 0.48, 0.5, "reference", fontsize=8, va="center", clip_on=False)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(0.0, 1.0)
    axes.set_ylabel("win rate")
    axes.grid(visible=False, axis="x")
    legend(figure, axes)
    return figure


def trade_off_figure(metrics: Metrics) -> Figure:
    """Mean rewards of two objectives at a time, a point per candidate, with the interval of each as a cross.

    Raises ValueError for a single objective.
    """
    figure, panels = pair_panels(metrics.objectives, height=3.1)
    for (first, second), axes in panels.items():
        for name in shown(metrics):
            candidate = metrics.candidates[name]
            _point(axes, name, metrics, candidate.rewards[first], candidate.rewards[second])
        axes.set_xlabel(f"mean reward: {first}")
        axes.set_ylabel(f"mean reward: {second}")
    legend(figure, figure.axes[0])
    return figure


def pareto_figure(metrics: Metrics, pareto: Pareto) -> Figure:
    """Win rates of two objectives at a time: the grids of mixtures and of soups, and the named candidates on top.

    Crosses are the named candidates' intervals. The stair is the front of the panel's two objectives: nothing lies
    above and to the right of it. With two objectives, neighbours on a grid are joined. All points are on the prompts of
    `pareto`. Raises ValueError for a single objective.
    """
    figure, panels = pair_panels(metrics.objectives, height=3.7)
    for (first, second), axes in panels.items():
        places = {n: (p.win_rates[first].value, p.win_rates[second].value) for n, p in pareto.points.items()}
        for kind in FAMILIES:
            _grid(axes, kind, pareto, places)
        sweep = [name for name in metrics.candidates if name not in shown(metrics)]
        if sweep:
            found = np.array([places[name] for name in sweep])
            axes.plot(*found.T, "P", color="#882255", markersize=5.5, label="MOPO's policies", zorder=2)
        for name in shown(metrics):
            rates = pareto.points[name].win_rates
            _point(axes, name, metrics, rates[first], rates[second], line_width=0.8)
        _stair(axes, [places[name] for name in nondominated({n: np.array(place) for n, place in places.items()})])
        axes.set_xlabel(f"win rate: {first}")
        axes.set_ylabel(f"win rate: {second}")
    legend(figure, figure.axes[0])
    return figure


def _grid(axes: Any, kind: str, pareto: Pareto, places: Mapping[str, tuple[float, float]]) -> None:
    """The points of one kind on the grid, from one end of the simplex to the other where there are two objectives."""
    label, colour, marker, line, fill = FAMILIES[kind]
    points = [name for name, p in pareto.points.items() if name.startswith(GRID_PREFIX) and p.kind == kind]
    if not points:
        return
    points.sort(key=lambda name: list((pareto.points[name].weights or {}).values()))
    two = len(pareto.points[points[0]].weights or {}) == 2
    axes.plot(
        *np.array([places[name] for name in points]).T,
        color=colour,
        marker=marker,
        markerfacecolor=fill,
        markersize=4.5,
        markeredgewidth=0.9,
        linestyle=line if two else "none",
        linewidth=0.9,
        label=label,
        zorder=2,
    )


def _stair(axes: Any, corners: Sequence[tuple[float, float]]) -> None:
    """The edge of what the corners dominate, out to the edges of the panel."""
    (left, _), (bottom, _) = axes.get_xlim(), axes.get_ylim()
    x, y = np.array(sorted(corners)).T
    stair = np.concatenate([[left], x, x[-1:]]), np.concatenate([y[:1], y, [bottom]])
    axes.set_xlim(left)
    axes.set_ylim(bottom)
    axes.step(*stair, where="pre", color="black", linewidth=1.0, linestyle=":", label="front of the two", zorder=1)


def kl_figure(metrics: Metrics) -> Figure:
    """How far from the reference a candidate is, KL in nats per completion, against its minimum win rate."""
    figure, axes = single_axes(7.2, 3.4)
    for name in shown(metrics):
        candidate = metrics.candidates[name]
        _point(axes, name, metrics, candidate.kl, candidate.minimum_win_rate)
    axes.axhline(0.5, color="#333333", linewidth=1.0, linestyle="--", zorder=1)
    axes.set_xlabel("KL to the reference, nats per completion")
    axes.set_ylabel("minimum win rate")
    legend(figure, axes)
    return figure


def training_figure(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Training loss of each policy: objective → (step, loss)."""
    figure, axes = single_axes(7.2, 3.0)
    for name, points in curves.items():
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, color=style(name, list(curves))[0], linewidth=1.4, label=name)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("training loss")
    legend(figure, axes)
    return figure


def _point(axes: Any, name: str, metrics: Metrics, x: Estimate, y: Estimate, *, line_width: float = 1.2) -> None:
    colour, marker = style(name, metrics.objectives, list(metrics.candidates))
    is_star = marker == "*"
    axes.errorbar(
        [x.value],
        [y.value],
        xerr=_bars([x]),
        yerr=_bars([y]),
        color=colour,
        marker=marker,
        markersize=13 if is_star else 8,
        markerfacecolor="white" if name in HOLLOW else colour,
        markeredgecolor=colour if name in HOLLOW else "white",
        markeredgewidth=1.3 if name in HOLLOW else 0.5,
        elinewidth=line_width,
        linestyle="none",
        label=metrics.label(name),
        zorder=4 if name == MPO else 3,
    )


def _bars(estimates: Sequence[Estimate]) -> Floats:
    """(2, N) distances below and above; 0 where there is no interval, and never negative."""
    below = [0.0 if e.low is None else max(0.0, e.value - e.low) for e in estimates]
    above = [0.0 if e.high is None else max(0.0, e.high - e.value) for e in estimates]
    return np.array([below, above])
