"""The report's part about MOPO: what each problem asked for, what its pool gives, and what holds on held-out prompts.

`solved` is problem → what its mopo.json holds; `trained` problem → bounded objective → λ at the end of an online
training, empty where there was none; `certificates` problem → what its certificate.json holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from mpo_ray.drawing import DARK, legend_of, objective_style, plain
from mpo_ray.evaluation.certificate import shown_estimate

#: Problems with the same primary and bounded objective that make a sweep worth a picture.
SWEEP = 3


def mopo_section(
    solved: Mapping[str, Any], trained: Mapping[str, Mapping[str, float]], certificates: Mapping[str, Any]
) -> dict[str, Any]:
    """The table {"columns", "rows"} of every problem's objectives, and the pool's errors as a sentence."""
    columns = [
        "λ, pool",
        "λ, training",
        "pool's optimum",
        "its ρ on held-out prompts",
        "policy, held out",
        "bound",
        "certificate",
    ]
    rows = {}
    for problem, result in solved.items():
        certificate, primary = certificates[problem], result["primary"]
        rows[f"{problem}: {primary}, maximised"] = [
            "",
            "",
            f"{result['values'][primary]:.3f}",
            f"{result['heldout_values'][primary]:.3f}",
            shown_estimate(certificate["primary"][primary]),
            "",
            "",
        ]
        for name, found in certificate["bounds"].items():
            rows[f"{problem}: {name}"] = [
                f"{result['multipliers'][name]:.3f}",
                f"{trained[problem][name]:.3f}" if name in trained[problem] else "",
                f"{result['values'][name]:.3f}",
                f"{result['heldout_values'][name]:.3f}",
                shown_estimate(found),
                f"{found['bound']:.3f}",
                found["verdict"],
            ]
    errors = {name: error for result in solved.values() for name, error in result["pool_errors"].items()}
    return {
        "table": {"columns": columns, "rows": rows},
        "errors": ", ".join(f"{name} {error:.3f}" for name, error in errors.items()),
        "warnings": {problem: result["warnings"] for problem, result in solved.items() if result["warnings"]},
    }


def sweep_figure(certificates: Mapping[str, Any]) -> Figure | None:
    """Held-out win rates against the bound, a panel for each primary and bounded objective; None without a sweep."""
    sweeps: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for certificate in certificates.values():
        if len(certificate["bounds"]) == 1:
            [primary], [bounded] = certificate["primary"], certificate["bounds"]
            sweeps.setdefault((primary, bounded), []).append(certificate)
    sweeps = {names: found for names, found in sweeps.items() if len(found) >= SWEEP}
    if not sweeps:
        return None
    objectives = list(dict.fromkeys(name for names in sweeps for name in names))
    figure = Figure(figsize=(max(6.0, 4.2 * len(sweeps)), 4.0), layout="constrained")
    entries = {}
    for axes, ((primary, bounded), found) in zip(
        figure.subplots(1, len(sweeps), squeeze=False).ravel(), sweeps.items(), strict=True
    ):
        plain(axes)
        found = sorted(found, key=lambda c: float(c["bounds"][bounded]["bound"]))
        places = [c["bounds"][bounded]["bound"] for c in found]
        for name, values in {
            bounded: [c["bounds"][bounded] for c in found],
            primary: [c["primary"][primary] for c in found],
        }.items():
            colour, marker = objective_style(name, objectives)
            entries[name] = axes.errorbar(
                places,
                [v["value"] for v in values],
                yerr=[[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]],
                color=colour,
                marker=marker,
                linestyle="-" if name == bounded else "--",
                capsize=3.0,
            )
        (entries["the bound"],) = axes.plot(places, places, color=DARK, linestyle=":")
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(f"bound of {bounded}")
        axes.set_ylabel("win rate, held-out prompts")
        axes.set_title(f"{primary} maximised", fontsize=10)
    legend_of(figure, entries)
    return figure
