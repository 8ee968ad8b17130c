"""What all pictures share: colours that are told apart by readers with the common forms of colour blindness (Okabe and
Ito's palette), markers, plain axes, one legend above the panels, PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#332288", "#999933", "#88CCEE", "#882255"]
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


def legend(figure: Figure, axes: Any) -> None:
    """One legend above the panels, without a frame, in as many even rows as the figure's width asks for."""
    handles, labels = axes.get_legend_handles_labels()
    entry = 0.65 + 0.065 * max(map(len, labels))  # inches, about
    in_a_row = max(1, int(figure.get_figwidth() / entry))
    rows = -(-len(labels) // in_a_row)
    figure.legend(handles, labels, loc="outside upper center", ncols=-(-len(labels) // rows), frameon=False, fontsize=9)
