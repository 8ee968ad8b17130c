"""What all pictures share: colours that are told apart by readers with the common forms of colour blindness (Okabe and
Ito's palette), markers, plain axes, panels for pairs, one legend above the panels, PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from matplotlib.figure import Figure

from mpo_ray.records import MPO, REFERENCE, SOUP_MPO, SOUP_UNIFORM, UNIFORM

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#332288", "#999933", "#88CCEE", "#882255"]
#: Colour and marker of what is no objective's policy; a soup has those of the mixture at its weights.
FIXED = {
    REFERENCE: ("#6B6B6B", "X"),
    UNIFORM: ("#56B4E9", "D"),
    SOUP_UNIFORM: ("#56B4E9", "D"),
    MPO: ("#D55E00", "*"),
    SOUP_MPO: ("#D55E00", "*"),
}
#: What is not to be believed, and lines that say where something stands.
GREY, DARK = "#B8B8B8", "#333333"
MARKERS = ["o", "s", "^", "v", "P", "<", ">", "h"]
DPI = 120


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def objective_style(name: str, objectives: Sequence[str]) -> tuple[str, str]:
    """Colour and marker of an objective, the same in every picture."""
    number = list(objectives).index(name) if name in objectives else len(objectives)
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def single_axes(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of this size in inches with one plain set of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    plain(axes)
    return figure, axes


def plain(axes: Any) -> None:
    """No frame above and right, a light grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#E3E3E3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def pair_panels(objectives: Sequence[str], *, height: float) -> tuple[Figure, dict[tuple[str, str], Any]]:
    """A figure with a panel for every pair of objectives, three in a row, each `height` inches high.

    Raises ValueError for a single objective.
    """
    pairs = list(combinations(objectives, 2))
    if not pairs:
        raise ValueError(f"A trade-off needs at least two objectives; there is only {objectives[0]!r}.")
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(max(6.0, 3.4 * columns), height * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(pairs) :]:
        axes.remove()
    for axes in panels[: len(pairs)]:
        plain(axes)
        axes.locator_params(nbins=5)
    return figure, dict(zip(pairs, panels, strict=False))


def legend(figure: Figure, axes: Any) -> None:
    """One legend above the panels, without a frame, in as many even rows as the figure's width asks for."""
    handles, labels = axes.get_legend_handles_labels()
    legend_of(figure, dict(zip(labels, handles, strict=True)))


def legend_of(figure: Figure, entries: Mapping[str, Any], *, marker_scale: float = 1.0) -> None:
    """As `legend`, of these entries: label → what it stands for. Markers are `marker_scale` of their size."""
    entry = 0.65 + 0.065 * max(map(len, entries))  # inches, about
    in_a_row = max(1, int(figure.get_figwidth() / entry))
    rows = -(-len(entries) // in_a_row)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside upper center",
        ncols=-(-len(entries) // rows),
        frameon=False,
        fontsize=9,
        markerscale=marker_scale,
    )
