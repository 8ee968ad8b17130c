"""Several finished runs side by side, as Markdown: python benchmarks/compare_runs.py RUN [RUN …] [--tokens RUN …]

Four tables: the minimum win rate of every candidate in every run, with MPO's paired difference from the best baseline;
the same as means over the seeds of a setting (objectives and β); the evidence on each fit (λ, effective samples, KL of
the policies, log Z); and what the samples predicted against what decoding gave, for every mixture of each run. Runs
need `evaluation.fits: true` for the fits that were not chosen.

--tokens: runs of the same names, policies and prompts whose mixtures were decoded token by token; their mixtures, and
the soup at their λ, join the means over seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mpo_ray.data.scores import scores_from_table
from mpo_ray.evaluation.completions import resample
from mpo_ray.evaluation.estimates import Estimate, written
from mpo_ray.evaluation.metrics import Metrics
from mpo_ray.evaluation.verdict import baselines
from mpo_ray.fitting.trade_off import predict_trade_off
from mpo_ray.maths.bounded_means import BoundedMeans
from mpo_ray.records import FIT_PREFIX, MPO, REFERENCE, SOUP_UNIFORM, UNIFORM
from mpo_ray.run import Run

#: What the candidates of the runs of --tokens are called, after their names.
TOKENS = "token by token"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run directories")
    parser.add_argument("--tokens", nargs="*", default=[], help="run directories")
    given = parser.parse_args()
    runs, tokens = ({Run.at(path).name: Run.at(path) for path in paths} for paths in (given.runs, given.tokens))
    metrics = {name: Metrics.from_json(run.read_json("evaluation/metrics.json")) for name, run in runs.items()}
    fits = {name: run.read_json("fit.json") for name, run in runs.items()}
    print(quality(metrics))
    print(over_seeds(list(runs.values()), tokens))
    print(evidence(metrics, fits))
    print(prediction(runs, metrics, fits))
    return 0


def quality(metrics: Mapping[str, Metrics]) -> str:
    """Minimum win rates; single policies are one column, the best of them."""
    names = list(dict.fromkeys(c for m in metrics.values() for c in m.candidates))
    policies = {o for m in metrics.values() for o in m.objectives}
    columns = [c for c in names if c not in policies and c not in (REFERENCE, MPO)]
    header = ["run", "best single policy", *columns, "MPO", "best baseline", "MPO − best baseline", "MPO − best policy"]
    rows = []
    for name, found in metrics.items():
        candidates = found.candidates
        single = max(found.objectives, key=lambda o: candidates[o].minimum_win_rate.value)
        best = max(baselines(found), key=lambda c: candidates[c].minimum_win_rate.value)
        rows.append(
            [
                name,
                f"{shown(candidates[single].minimum_win_rate)} ({single})",
                *(shown(candidates[c].minimum_win_rate) if c in candidates else "" for c in columns),
                f"**{shown(candidates[MPO].minimum_win_rate)}**",
                best,
                interval(candidates[best].mpo_minus_this),
                interval(candidates[single].mpo_minus_this),
            ]
        )
    return "Minimum win rate\n\n" + table(header, rows)


def over_seeds(runs: Sequence[Run], tokens: Mapping[str, Run] = MappingProxyType({}), draws: int = 1000) -> str:
    """Mean over seeds of every candidate's minimum win rate, and of MPO's difference from it, for every setting.

    Intervals are 95 % over prompts, which are resampled for all runs of a setting together: they hold for the policies
    that these seeds trained. Of the single policies only the best of each seed is shown.
    """
    settings: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        config = run.read_config()
        settings.setdefault((tuple(config["objectives"]), config["policies"]["beta"]), []).append(run)
    minima, gaps = dict[str, dict[str, str]](), dict[str, dict[str, str]]()
    for (objectives, beta), group in settings.items():
        tables = [beside(run, tokens.get(run.name)) for run in group]
        wins = [resample(t, objectives, draws=draws, seed=0).wins for t in tables]
        best = [max(objectives, key=lambda o, w=w: w[o].mean.min()) for w in wins]  # type: ignore[misc]
        names = ["best policy", *(c for c in wins[0] if c not in (*objectives, REFERENCE))]
        found = [{c: w[top if c == "best policy" else c] for c in names} for w, top in zip(wins, best, strict=True)]
        means = {c: np.array([f[c].mean.min() for f in found]) for c in names}
        low = {c: np.mean([f[c].low.min(axis=1) for f in found], axis=0) for c in names}
        high = {c: np.mean([f[c].high.min(axis=1) for f in found], axis=0) for c in names}
        setting = f"K = {len(objectives)}, β = {beta:g} ({len(group)} seeds)"
        for name in names:
            mean = _estimate(means[name].mean(), low[name], high[name])
            minima.setdefault(name, {})[setting] = shown(mean)
            gap = _estimate((means[MPO] - means[name]).mean(), low[MPO] - high[name], high[MPO] - low[name])
            held = int((means[MPO] >= means[name]).sum())
            gaps.setdefault(name, {})[setting] = f"{interval(gap)}, {held} of {len(group)}"
    del gaps[MPO]
    return (
        f"Mean over seeds of the minimum win rate\n\n{by_setting(minima)}\n"
        f"MPO − this, and in how many seeds MPO is at least this\n\n{by_setting(gaps)}"
    )


def by_setting(cells: Mapping[str, Mapping[str, str]]) -> str:
    """A row per candidate, a column per setting."""
    settings = list(dict.fromkeys(setting for row in cells.values() for setting in row))
    return table(["", *settings], [[name, *(row.get(s, "") for s in settings)] for name, row in cells.items()])


def beside(run: Run, other: Run | None) -> pa.Table:
    """A run's completions, and those of the other's mixtures and of the soup at its λ, under names that say so."""
    table = run.read_table("evaluation/completions.parquet")
    if other is None:
        return table
    added = other.read_table("evaluation/completions.parquet")
    fixed = (REFERENCE, SOUP_UNIFORM, *run.read_config()["objectives"])
    added = added.filter(pc.invert(pc.is_in(added["candidate"], pa.array(fixed))))
    place = added.column_names.index("candidate")
    names = pc.binary_join_element_wise(added["candidate"], TOKENS, ", ")
    return pa.concat_tables([table, added.set_column(place, "candidate", names)])


def evidence(metrics: Mapping[str, Metrics], fits: Mapping[str, Any]) -> str:
    """λ of every fit, how many effective samples it rests on, and log Z there: what token-level decoding drops."""
    header = ["run", "KL of the policies", "fit", "λ", "effective samples (median)", "log Z", "tokens", "minimum"]
    rows = []
    for name, found in metrics.items():
        kl = ", ".join(f"{o} {found.candidates[o].kl.value:.2f}" for o in found.objectives)
        entries = {f"{FIT_PREFIX}{e}": f for e, f in fits[name]["alternatives"].items()} | {MPO: fits[name]}
        for candidate, fit in entries.items():
            if candidate not in found.candidates:
                continue
            own, size = found.candidates[candidate], fit["effective_sample_size"]["median"]
            rows.append(
                [
                    name,
                    kl,
                    f"{fit['method']}, {fit['estimator']}" if candidate != MPO else fit["method"],
                    ", ".join(f"{w:.2f}" for w in fit["weights"].values()),
                    f"{size:.1f} of {fit['samples_per_prompt']['max']}",
                    f"{own.log_z.value:.2f}",
                    f"{own.num_tokens:.0f}",
                    shown(own.minimum_win_rate),
                ]
            )
    return "The fits\n\n" + table(header, rows)


def prediction(runs: Mapping[str, Run], metrics: Mapping[str, Metrics], fits: Mapping[str, Any]) -> str:
    """Win rates and KL predicted for π_λ from the samples, and those of the mixture as decoded."""
    header = ["run", "mixture", "win rates predicted", "decoded", "KL predicted", "decoded", "effective samples"]
    rows = []
    for name, run in runs.items():
        found, objectives = metrics[name], metrics[name].objectives
        mixtures = {UNIFORM: dict.fromkeys(objectives, 1 / len(objectives)), MPO: fits[name]["weights"]}
        mixtures |= {f"{FIT_PREFIX}{e}": fit["weights"] for e, fit in fits[name]["alternatives"].items()}
        mixtures = {c: w for c, w in mixtures.items() if c in found.candidates}
        predicted = predict_trade_off(
            scores_from_table(run.read_table("scores"), objectives, min_objectives=1),
            list(mixtures.values()),
            estimator="balanced",
            draws=0,
            confidence=0.95,
            seed=0,
        )["points"]
        for (candidate, _), point in zip(mixtures.items(), predicted, strict=True):
            own = found.candidates[candidate]
            rows.append(
                [
                    name,
                    candidate,
                    " ".join(f"{point['win_rates'][o][0]:.2f}" for o in objectives),
                    " ".join(f"{own.win_rates[o].value:.2f}" for o in objectives),
                    f"{point['kl'][0]:.2f}",
                    f"{own.kl.value:.2f}",
                    f"{point['effective_sample_size']:.1f}{'' if point['reliable'] else ' (too few)'}",
                ]
            )
    return "Predicted and decoded\n\n" + table(header, rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _estimate(value: float, low: Any, high: Any) -> Estimate:
    """A mean over seeds, and its interval from draws below and above it (`bounded_means`)."""
    return Estimate.of_each(BoundedMeans(np.array([value]), low[:, None], high[:, None]), 0.95)[0]


def shown(estimate: Any) -> str:
    return written(estimate, 3)


def interval(estimate: Any) -> str:
    """A difference with its signs; without brackets where both are the same completions."""
    if estimate.low is None:
        return f"{estimate.value:+.3f}"
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


if __name__ == "__main__":
    sys.exit(main())
