"""The report's pictures. A candidate has one colour and one marker in all of them; a policy's is its objective's.

The colours are told apart by readers with the common forms of colour blindness (Okabe and Ito's palette).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mpo_ray.evaluation.metrics import MPO, UNIFORM, Estimate, Metrics
from mpo_ray.records import REFERENCE

Floats = NDArray[np.float64]

POLICIES = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#332288", "#999933", "#88CCEE", "#882255"]
FIXED = {REFERENCE: ("#6B6B6B", "X"), UNIFORM: ("#56B4E9", "D"), MPO: ("#D55E00", "*")}
MARKERS = ["o", "s", "^", "v", "P", "<", ">", "h"]
DPI = 120


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def style(candidate: str, objectives: Sequence[str]) -> tuple[str, str]:
    """Colour and marker of a candidate, the same in every picture."""
    if candidate in FIXED:
        return FIXED[candidate]
    number = list(objectives).index(candidate) if candidate in objectives else len(objectives)
    return POLICIES[number % len(POLICIES)], MARKERS[number % len(MARKERS)]


def win_rate_figure(metrics: Metrics) -> Figure:
    """Win rates against the reference with intervals, grouped by objective, and the minimum as a group of its own."""
    names = [name for name in metrics.candidates if name != REFERENCE]
    groups = [*metrics.objectives, "minimum"]
    figure, axes = _axes(max(7.2, 1.9 * len(groups)), 3.9)
    width = 0.8 / len(names)
    axes.axvspan(len(groups) - 1.5, len(groups) - 0.5, color="#F1EEE8", zorder=0)
    for n, name in enumerate(names):
        candidate = metrics.candidates[name]
        estimates = [*(candidate.win_rates[o] for o in metrics.objectives), candidate.minimum_win_rate]
        places = np.arange(len(groups)) + (n - (len(names) - 1) / 2) * width
        axes.bar(
            places,
            [e.value for e in estimates],
            0.9 * width,
            yerr=_bars(estimates),
            color=style(name, metrics.objectives)[0],
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
    _legend(figure, axes)
    return figure


def trade_off_figure(metrics: Metrics) -> Figure:
    """Mean rewards of two objectives at a time, a point per candidate, with the interval of each as a cross.

    Raises ValueError for a single objective.
    """
    pairs = list(combinations(metrics.objectives, 2))
    if not pairs:
        raise ValueError(f"A trade-off needs at least two objectives; there is only {metrics.objectives[0]!r}.")
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(max(5.0, 3.4 * columns), 3.1 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (first, second) in zip(panels, pairs, strict=False):
        _plain(axes)
        axes.locator_params(nbins=5)
        for name, candidate in metrics.candidates.items():
            _point(axes, name, metrics, candidate.rewards[first], candidate.rewards[second])
        axes.set_xlabel(f"mean reward: {first}")
        axes.set_ylabel(f"mean reward: {second}")
    for axes in panels[len(pairs) :]:
        axes.remove()
    _legend(figure, panels[0])
    return figure


def kl_figure(metrics: Metrics) -> Figure:
    """How far from the reference a candidate is, KL in nats per completion, against its minimum win rate."""
    figure, axes = _axes(7.2, 3.4)
    for name, candidate in metrics.candidates.items():
        _point(axes, name, metrics, candidate.kl, candidate.minimum_win_rate)
    axes.axhline(0.5, color="#333333", linewidth=1.0, linestyle="--", zorder=1)
    axes.set_xlabel("KL to the reference, nats per completion")
    axes.set_ylabel("minimum win rate")
    _legend(figure, axes)
    return figure


def training_figure(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Training loss of each policy: objective → (step, loss)."""
    figure, axes = _axes(7.2, 3.0)
    for name, points in curves.items():
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, color=style(name, list(curves))[0], linewidth=1.4, label=name)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("training loss")
    _legend(figure, axes)
    return figure


def _point(axes: Any, name: str, metrics: Metrics, x: Estimate, y: Estimate) -> None:
    colour, marker = style(name, metrics.objectives)
    axes.errorbar(
        [x.value],
        [y.value],
        xerr=_bars([x]),
        yerr=_bars([y]),
        color=colour,
        marker=marker,
        markersize=13 if name == MPO else 8,
        markeredgecolor="white",
        markeredgewidth=0.5,
        elinewidth=1.2,
        linestyle="none",
        label=metrics.label(name),
        zorder=4 if name == MPO else 3,
    )


def _bars(estimates: Sequence[Estimate]) -> Floats:
    """(2, N) distances below and above; 0 where there is no interval, and never negative."""
    below = [0.0 if e.low is None else max(0.0, e.value - e.low) for e in estimates]
    above = [0.0 if e.high is None else max(0.0, e.high - e.value) for e in estimates]
    return np.array([below, above])


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#E3E3E3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def _legend(figure: Figure, axes: Any) -> None:
    """One legend above the panels, without a frame, in as many even rows as the figure's width asks for."""
    handles, labels = axes.get_legend_handles_labels()
    entry = 0.65 + 0.065 * max(map(len, labels))  # inches, about
    in_a_row = max(1, int(figure.get_figwidth() / entry))
    rows = -(-len(labels) // in_a_row)
    figure.legend(handles, labels, loc="outside upper center", ncols=-(-len(labels) // rows), frameon=False, fontsize=9)
