"""The end of a run on the terminal: the table of candidates, and the weights with what is known of their fit.

Written for 100 columns; where there is no terminal the same lines come without colour.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mpo_ray.evaluation.estimates import Estimate, number, written
from mpo_ray.evaluation.metrics import Metrics
from mpo_ray.evaluation.pareto import Pareto
from mpo_ray.evaluation.verdict import baseline_verdict, verdict
from mpo_ray.fitting.summary import fit_summary
from mpo_ray.records import MPO

#: Width where the output is not a terminal.
PLAIN_WIDTH = 100


def metrics_table(metrics: Metrics, fit: Mapping[str, Any]) -> RenderableType:
    """The summary of an evaluation: win rates, mean rewards, the verdict, and what fit.json says of the weights λ."""
    verdicts = [found for found in (verdict(metrics), baseline_verdict(metrics)) if found is not None]
    lines = [Text(found.sentence, style="bold") for found in verdicts]
    if metrics.pareto is not None and metrics.pareto.hypervolume.soup is not None:
        lines.append(_volumes(metrics.pareto))
    notes = Text(
        f"{metrics.num_prompts} prompts; ± is half of the {100 * metrics.confidence:g} % interval "
        f"({metrics.draws} bootstrap draws over prompts). KL is to the reference. {_decoding(metrics)}",
        style="dim",
    )
    return Group(
        _win_rates(metrics),
        _rewards(metrics),
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


def _win_rates(metrics: Metrics) -> Table:
    table = _table("win rate against the reference", metrics)
    table.add_column("minimum", justify="right", style="bold", vertical="bottom")
    table.add_column("MPO − this", justify="right")
    for name, candidate in metrics.candidates.items():
        difference = candidate.mpo_minus_this
        table.add_row(
            metrics.label(name),
            *(_plus_minus(candidate.win_rates[objective]) for objective in metrics.objectives),
            written(candidate.minimum_win_rate),
            "" if difference is None else _plus_minus(difference),
            style="green" if name == MPO else None,
        )
    return table


def _rewards(metrics: Metrics) -> Table:
    table = _table("mean reward", metrics)
    for name in ("KL, nats", "log Z", "tokens"):
        table.add_column(name, justify="right")
    for name, candidate in metrics.candidates.items():
        table.add_row(
            metrics.label(name),
            *(_plus_minus(candidate.rewards[objective]) for objective in metrics.objectives),
            number(candidate.kl.value),
            number(candidate.log_z.value),
            number(candidate.num_tokens, 1),
            style="green" if name == MPO else None,
        )
    return table


def _table(title: str, metrics: Metrics) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for objective in metrics.objectives:
        table.add_column(objective, justify="right")
    return table


def _plus_minus(estimate: Estimate) -> str:
    half = f" ±{number(estimate.half_width)}" if estimate.low is not None else ""
    return number(estimate.value) + half
