"""A fit as lines for the terminal: the weights with their intervals, the certificate, the gains, the cautions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def fit_summary(fit: Mapping[str, Any]) -> RenderableType:
    """What fit.json holds, in at most 100 columns."""
    return Group(_weights(fit), Text(_certificate(fit)), *(caution(text) for text in fit["warnings"]))


def trade_off_table(trade_off: Mapping[str, Any]) -> RenderableType:
    """Predictions of one or a few λ."""
    percent = f"{100 * trade_off['confidence']:g} %"
    table = titled_table(f"predicted under π_λ ({trade_off['estimator']} estimator, {percent} intervals)")
    table.add_column("")
    for point in trade_off["points"]:
        table.add_column(", ".join(f"{name} {value:.2f}" for name, value in point["weights"].items()), justify="right")
    kinds = {"rewards": "reward", "win_rates": "win rate"}
    for kind, shown in kinds.items():
        for name in trade_off["objectives"]:
            if all(kind in point for point in trade_off["points"]):
                table.add_row(f"{shown}, {name}", *(_estimate(p[kind][name]) for p in trade_off["points"]))
    for kind, shown in {"kl": "KL to the reference, nats", "num_tokens": "tokens"}.items():
        if all(kind in point for point in trade_off["points"]):
            table.add_row(shown, *(_estimate(point[kind]) for point in trade_off["points"]))
    table.add_row(
        "effective sample size (median)",
        *(
            f"{point['effective_sample_size']:.1f}{'' if point['reliable'] else ' (too small)'}"
            for point in trade_off["points"]
        ),
    )
    return table


def caution(text: str) -> Text:
    return Text(f"caution: {text}", style="yellow")


def _weights(fit: Mapping[str, Any]) -> Table:
    table = titled_table(f"weights ({fit['method']}, {fit['estimator']} estimator)")
    intervals = fit["intervals"]
    for column in ("", "λ", "" if intervals is None else f"{100 * intervals['confidence']:g} % interval"):
        table.add_column(column, justify="right" if column else "left")
    for column in ("E[ℓ] under π_λ", "gain over π_ref", "binds"):
        table.add_column(column, justify="right")
    for name, value in fit["weights"].items():
        low, high = (0.0, 0.0) if intervals is None else intervals["weights"][name]
        table.add_row(
            name,
            f"{value:.3f}",
            "" if intervals is None else f"[{low:.3f}, {high:.3f}]",
            f"{fit['gradient'][name]:+.3f}",
            f"{fit['gains'][name]:+.3f}",
            "yes" if name in fit["binding"] else "",
        )
    return table


def _certificate(fit: Mapping[str, Any]) -> str:
    size, numbers = fit["effective_sample_size"], fit["samples_per_prompt"]
    responses = f"{numbers['max']}" if numbers["min"] == numbers["max"] else f"{numbers['min']} to {numbers['max']}"
    bounds = ""
    if fit["intervals"] is not None and fit["intervals"]["objective_value"] is not None:
        low, high = fit["intervals"]["objective_value"]
        bounds = f" [{low:.4f}, {high:.4f}]"
    return (
        f"F(λ) {fit['objective_value']:.4f}{bounds} nats, gap {fit['gap']:.1e}, bias of few samples "
        f"{fit['jackknife_bias']:.1e}\n{fit['num_prompts']} prompts × {responses} responses; effective sample size: "
        f"median {size['median']:.1f}, min {size['min']:.1f}"
    )


def _estimate(value: list[float]) -> str:
    return f"{value[0]:.3f}" if len(value) == 1 else f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"


def titled_table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
