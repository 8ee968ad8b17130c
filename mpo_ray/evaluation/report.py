"""report.html: one run's evaluation on one self-contained page, with its pictures also as files.

What the page says comes from the arguments alone; a part whose argument is empty or None is left out. All text is
escaped: completions are whatever a model wrote.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure

from mpo_ray.drawing import png
from mpo_ray.evaluation import figures
from mpo_ray.evaluation.completions import REWARD
from mpo_ray.evaluation.estimates import number
from mpo_ray.evaluation.fit_section import fit_pictures, fit_section
from mpo_ray.evaluation.metrics import Metrics
from mpo_ray.evaluation.mopo_section import mopo_section, sweep_figure
from mpo_ray.evaluation.verdict import verdict
from mpo_ray.records import GRID_PREFIX, MPO, decode_prompt, turns_of

#: Prompts whose completions are shown side by side, and the longest text that is shown whole.
SHOWN_PROMPTS = 4
SHOWN_CHARACTERS = 900

#: The counts of judge.json that the page shows.
JUDGE_KINDS = ("wins", "losses", "ties", "first", "second", "identical", "unparsed", "refused", "missing")

CAPTIONS = {
    "win_rates": "Win rate against the reference, with intervals. The dashed line is parity; the shaded group is the "
    "worst objective of each candidate.",
    "trade_off": "Mean rewards of two objectives at a time. Up and to the right is better; crosses are the intervals.",
    "pareto": "Win rates of two objectives at a time. Up and to the right is better; crosses are the intervals, "
    "the stair is the front of the two objectives.",
    "kl": "Distance from the reference against the worst objective's win rate.",
    "mopo": "What MOPO's policies reach on held-out prompts, against the bound; lines are intervals.",
    "training": "Training loss of the single policies.",
}


def write_report(
    directory: Path,
    *,
    run_name: str,
    metrics: Metrics,
    fit: Mapping[str, Any],
    trade_off: Mapping[str, Any] | None,
    predicted: Mapping[str, Mapping[str, Any]],
    completions: pa.Table,
    counts: Mapping[str, Mapping[str, Any]],
    conflict: Sequence[Mapping[str, Any]] | None,
    provenance: Mapping[str, Any],
    training: Mapping[str, Mapping[str, Any]],
    judge: Mapping[str, Any] | None = None,
    mopo: Mapping[str, Any] | None = None,
    samples: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Write report.html, metrics.json and the pictures into `directory`, and return the path of report.html.

    fit: what fit.json holds
    trade_off: what trade_off.json holds; None if nothing was predicted
    predicted: candidate with known weights → its predictions, as a point of trade_off.json
    completions: the evaluation's table, with `prompt`, `is_chat` and `response` besides what the metrics are made of
    counts: objective → what was counted of its comparisons (numbers, or one level of named numbers)
    conflict: per pair of objectives `first`, `second`, `disagreement`, `rank_correlation`, `sentence`; None if unknown
    provenance: what the run was made with (versions, seed, digest of the config, …), nested as deep as need be
    judge: what judge.json holds; None without a judge
    mopo: `solved`, `trained` and `certificates` of `mopo_section`; None without problems
    samples: proposal → `samples`, `finished` (share) and `num_tokens` of what it drew for the fit; None if unknown
    training: objective → `steps`, `heldout` (named numbers) and `history` (a list of {"step", "loss"}), each optional
    """
    directory.mkdir(parents=True, exist_ok=True)
    drawn = {name: (figure, CAPTIONS[name]) for name, figure in _figures(metrics, training).items()}
    drawn |= fit_pictures(fit, trade_off, predicted, metrics)
    sweep = None if mopo is None else sweep_figure(mopo["certificates"])
    drawn |= {} if sweep is None else {"mopo": (sweep, CAPTIONS["mopo"])}
    pictures = {}
    for name, (figure, caption) in drawn.items():
        content = png(figure)
        (directory / f"{name}.png").write_bytes(content)
        source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        pictures[name] = {"source": source, "caption": caption}
    _write_json(directory / "metrics.json", metrics.as_json())
    page = _template().render(
        run_name=run_name,
        metrics=metrics,
        mpo=MPO,
        verdict=verdict(metrics),
        pareto=metrics.pareto,
        front=_front(metrics),
        pictures=pictures,
        fit=fit_section(fit, predicted, metrics),
        examples=_examples(metrics, completions),
        counts=_table_of(counts),
        samples=_table_of({name: _sample_numbers(values) for name, values in (samples or {}).items()}),
        conflict=conflict,
        training=_table_of({name: _training_numbers(values) for name, values in training.items()}),
        provenance=_flat(provenance),
        judge=judge,
        judge_kinds=JUDGE_KINDS,
        mopo=None if mopo is None else mopo_section(**mopo),
    )
    path = directory / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _figures(metrics: Metrics, training: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
    drawn = {"win_rates": figures.win_rate_figure(metrics)}
    if len(metrics.objectives) > 1:
        drawn["trade_off"] = figures.trade_off_figure(metrics)
    if metrics.pareto is not None:
        drawn["pareto"] = figures.pareto_figure(metrics, metrics.pareto)
    drawn["kl"] = figures.kl_figure(metrics)
    curves = {
        name: [(float(point["step"]), float(point["loss"])) for point in values.get("history") or [] if "loss" in point]
        for name, values in training.items()
    }
    if any(len(points) > 1 for points in curves.values()):
        drawn["training"] = figures.training_figure({name: points for name, points in curves.items() if points})
    return drawn


def _examples(metrics: Metrics, completions: pa.Table) -> list[dict[str, Any]]:
    """The first completion of every candidate for a few prompts, spread evenly over the sorted prompt ids."""
    prompts = np.unique(completions["prompt_id"].to_numpy())
    chosen = prompts[np.unique(np.linspace(0, len(prompts) - 1, SHOWN_PROMPTS).round().astype(int))]
    rows = completions.filter(pc.is_in(completions["prompt_id"], pa.array(chosen)))
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows.sort_by("completion_id").to_pylist():
        first.setdefault((row["prompt_id"], row["candidate"]), row)
    examples = []
    for prompt in chosen.tolist():
        shown = [(name, first[prompt, name]) for name in metrics.candidates]
        examples.append(
            {
                "prompt": _turns(shown[0][1]["prompt"], is_chat=shown[0][1]["is_chat"]),
                "completions": [
                    {
                        "candidate": name,
                        "text": _shortened(row["response"]),
                        "rewards": {o: row[REWARD + o] for o in metrics.objectives},
                        "num_tokens": row["num_tokens"],
                        "finished": row["finished"],
                    }
                    for name, row in shown
                ],
            }
        )
    return examples


def _turns(text: str, *, is_chat: bool) -> list[tuple[str, str]]:
    return [(role, _shortened(turn)) for role, turn in turns_of(decode_prompt(text, is_chat))]


def _shortened(text: str) -> str:
    rest = len(text) - SHOWN_CHARACTERS
    return text if rest <= 0 else f"{text[:SHOWN_CHARACTERS]} … ({rest} more characters)"


def _training_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{key: value for key, value in values.items() if key not in ("heldout", "history")},
        **{f"held-out {key}": value for key, value in (values.get("heldout") or {}).items()},
    }


def _sample_numbers(values: Mapping[str, float]) -> dict[str, Any]:
    cut = f"{number(100 * (1 - values['finished']), 0)}\u2009%"
    return {"samples": values["samples"], "cut at the limit": cut, "tokens, mean": number(values["num_tokens"], 1)}


def _table_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Named rows of values as a header and cells; a row without a column has an empty cell. None without rows."""
    flat = {name: dict(_flat(row)) for name, row in rows.items()}
    columns = list(dict.fromkeys(column for row in flat.values() for column in row))
    if not columns:
        return None
    return {"columns": columns, "rows": {name: [row.get(c, "") for c in columns] for name, row in flat.items()}}


def _flat(value: Mapping[str, Any], place: str = "") -> list[tuple[str, str]]:
    """Nested values as (name, text) lines; None is left out."""
    lines: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{place}{key}".replace("_", " ")
        if isinstance(item, Mapping):
            lines += _flat(item, f"{name}: ")
        elif isinstance(item, list | tuple):
            lines.append((name, ", ".join(map(_text, item))))
        elif item is not None:
            lines.append((name, _text(item)))
    return lines


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _front(metrics: Metrics) -> str:
    """Who is on the front: names, and how many points of the grid."""
    if metrics.pareto is None:
        return ""
    on_grid = [name for name in metrics.pareto.front if name.startswith(GRID_PREFIX)]
    named = [metrics.label(name) for name in metrics.pareto.front if name not in on_grid]
    kinds = [metrics.pareto.points[name].kind for name in on_grid]
    counts = [f"{kinds.count(kind)} {kind}s of the grid" for kind in ("mixture", "soup") if kind in kinds]
    return ", ".join([*named, *counts])


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: files(__package__).joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["p_value"] = _p_value
    return environment.get_template("report.html.j2")
