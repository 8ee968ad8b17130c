"""The end of a run on the terminal: the table of candidates, and the weights with what is known of their fit.

Written for 100 columns; where there is no terminal the same lines come without colour. Many objectives make several
tables below each other. MPO's rows are green only where the verdict is that it is the highest.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mpo_ray.evaluation.estimates import number, written
from mpo_ray.evaluation.metrics import Metrics
from mpo_ray.evaluation.pareto import Pareto
from mpo_ray.evaluation.verdict import Kind, verdict
from mpo_ray.fitting.summary import fit_summary
from mpo_ray.records import MPO

#: Width where the output is not a terminal.
PLAIN_WIDTH = 100
#: Objectives that have room side by side.
SIDE_BY_SIDE = 3
#: How the verdict and MPO's rows look.
STYLES: dict[Kind | None, str] = {"highest": "green", "undecided": "yellow", "below": "red", None: ""}


def metrics_table(metrics: Metrics, fit: Mapping[str, Any]) -> RenderableType:
    """The summary of an evaluation: win rates, mean rewards, the verdict, and what fit.json says of the weights λ."""
    found = verdict(metrics)
    own = "bold green" if found is not None and found.kind == "highest" else "bold"
    lines = [] if found is None else [Text(found.sentence, style=f"bold {STYLES[found.kind]}")]
    if metrics.pareto is not None and metrics.pareto.hypervolume.soup is not None:
        lines.append(_volumes(metrics.pareto))
    parts = [metrics.objectives[i : i + SIDE_BY_SIDE] for i in range(0, len(metrics.objectives), SIDE_BY_SIDE)]
    notes = Text(
        f"{metrics.num_prompts} prompts; brackets are {100 * metrics.confidence:g} % intervals over prompts, one at a "
        f"time ({metrics.draws} draws). To decide: prompts with which a difference as large as this one would be told "
        "from 0 (probability 0.8). Cut: answers that reached the limit of tokens. Rows per token: model rows that a "
        f"decoded token needs. KL is to the reference. {_decoding(metrics)}",
        style="dim",
    )
    return Group(
        *(_estimates("win rate against the reference", metrics, "win_rates", part, own) for part in parts),
        _minima(metrics, own),
        *(_estimates("mean reward", metrics, "rewards", part, own) for part in parts),
        _costs(metrics, own),
        *lines,
        Text(),
        fit_summary(fit),
        Text(),
        notes,
    )


def _decoding(metrics: Metrics) -> str:
    if metrics.particles == 1:
        return "Mixtures are decoded token by token; log Z is what that drops, nats per completion."
    return (
        f"Mixtures are drawn whole, with {metrics.particles} particles; log Z is their normaliser, and what decoding "
        "token by token drops, nats per completion."
    )


def print_summary(metrics: Metrics, fit: Mapping[str, Any], *, file: TextIO | None = None) -> None:
    """Print `metrics_table` to `file` (standard output if none), plainly where that is not a terminal."""
    out = sys.stdout if file is None else file
    console = Console(file=out, highlight=False, width=None if out.isatty() else PLAIN_WIDTH)
    console.print(metrics_table(metrics, fit))


def _volumes(pareto: Pareto) -> Text:
    """The volumes of the families, and what they were measured on."""
    volume = pareto.hypervolume
    assert volume.soup is not None
    assert volume.difference is not None
    mopo = "" if volume.mopo is None else f"; MOPO's {volume.num_mopo} policies {written(volume.mopo, 3)}"
    return Text(
        f"Hypervolume of win rates above 0, {volume.num_points} points each: mixtures {written(volume.mixture, 3)}, "
        f"soups {written(volume.soup, 3)}; difference {written(volume.difference, 3)}{mopo} "
        f"({pareto.num_prompts} prompts)."
    )


def _estimates(title: str, metrics: Metrics, field: str, objectives: Sequence[str], own: str) -> Table:
    """One number of every candidate for each of these objectives, with its interval."""
    table = _table(title, objectives)
    for name, candidate in metrics.candidates.items():
        values = getattr(candidate, field)
        cells = [written(values[objective]) for objective in objectives]
        table.add_row(metrics.label(name), *cells, style=own if name == MPO else None)
    return table


def _minima(metrics: Metrics, own: str) -> Table:
    table = _table("minimum win rate", ["minimum", "MPO − this", "decided", "prompts to decide"])
    for name, candidate in metrics.candidates.items():
        difference = candidate.mpo_minus_this
        cells = ["", "", ""]
        if difference is not None and difference.low is None:
            cells = ["same completions", "", ""]
        elif difference is not None:
            decided = not difference.holds_zero
            number_of = (
                "" if decided else "–" if candidate.prompts_to_decide is None else f"{candidate.prompts_to_decide:,}"
            )
            cells = [written(difference, 3), "yes" if decided else "no", number_of]
        table.add_row(
            metrics.label(name), written(candidate.minimum_win_rate), *cells, style=own if name == MPO else None
        )
    return table


def _costs(metrics: Metrics, own: str) -> Table:
    table = _table("distance, length and cost", ["KL, nats", "log Z", "tokens", "cut", "rows per token"])
    for name, candidate in metrics.candidates.items():
        table.add_row(
            metrics.label(name),
            written(candidate.kl),
            number(candidate.log_z.value),
            number(candidate.num_tokens, 1),
            f"{number(100 * candidate.cut_share, 0)} %",
            "–" if candidate.rows_per_token is None else str(candidate.rows_per_token),
            style=own if name == MPO else None,
        )
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table
