"""The paper's estimator against the balanced one (docs/design.md 2.2, eq. 6a) at equal numbers of samples.

Worlds: every response can be enumerated, so errors are against the truth. Each spread of the policies' logits puts the
policies at another distance from the reference. With --scores, a table with many samples of the reference and of every
policy: estimates from few of its samples are compared with the balanced estimate from all of them.

Prints, and draws into --out: mean absolute error of F(λ) over the simplex, regret F(λ̂) − F(λ*) of the fitted weights,
Σ|λ̂ − λ*|, and the median effective sample size as a share of the samples.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mpo_ray.data.scores import ScoreTable, open_scores
from mpo_ray.drawing import COLOURS, MARKERS, legend, plain, png
from mpo_ray.maths.exact_fit import solve
from mpo_ray.maths.partition import effective_sample_size, objectives
from mpo_ray.maths.sample_table import SampleTable, log_proposal

Array = np.ndarray
NUMBERS = (6, 12, 24, 48, 96)
SPREADS = (0.3, 1.0, 2.0, 4.0)
NUM_POLICIES = 3


@dataclass(frozen=True)
class Truth:
    """What both estimators are measured against: F at the probes, and the exact F of any λ."""

    probes: Array
    values: Array
    weights: Array
    table: SampleTable

    def regret(self, weights: Array) -> float:
        return float(objectives(self.table, weights[None])[0] - objectives(self.table, self.weights[None])[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/estimators"), help="directory for the figures")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--scores", nargs="+", help="score table (a run's scores/*.parquet) with all proposals")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    results = {f"KL {kl:.2f} nats": rows for kl, rows in worlds(options.prompts, options.repeats, rng)}
    report("enumerable worlds", results)
    save(options.out / "estimators_worlds.png", results)
    if options.scores:
        table = open_scores(options.scores)
        results = {"score table": sampled(table, options.repeats, rng)}
        report(f"{table.num_prompts} prompts of {', '.join(options.scores)}", results)
        save(options.out / "estimators_scores.png", results)
    return 0


def worlds(num_prompts: int, repeats: int, rng: np.random.Generator):  # type: ignore[no-untyped-def]
    """Per spread: the mean KL(π_k ‖ π_ref) and the rows of both estimators. A reference of 200 even responses."""
    num_responses = 200
    for spread in SPREADS:
        logits = rng.normal(0, spread, size=(num_prompts, num_responses, NUM_POLICIES))
        log_policies = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        ratios = log_policies + np.log(num_responses)
        kl = float((np.exp(log_policies) * ratios).sum(axis=1).mean())
        everything = SampleTable.of_reference(ratios)
        probes = rng.dirichlet(np.ones(NUM_POLICIES), size=30)
        truth = Truth(probes, objectives(everything, probes), solve(everything).weights[0], everything)
        proposals = {
            "paper": np.full((num_prompts, num_responses, 1), 1.0 / num_responses),
            "balanced": np.exp(log_policies),
        }

        def draw(
            name: str, number: int, ratios: Array = ratios, proposals: dict[str, Array] = proposals
        ) -> SampleTable:
            each = number // proposals[name].shape[2]
            rows = [
                np.concatenate([rng.choice(num_responses, size=each, p=p) for p in distribution.T])
                for distribution in proposals[name]
            ]
            drawn = np.concatenate([ratios[p][chosen] for p, chosen in enumerate(rows)])
            share = log_proposal(drawn, np.ones_like(drawn)) if name == "balanced" else np.zeros(len(drawn))
            return SampleTable(drawn, share, np.arange(num_prompts + 1) * number)

        yield kl, compare(draw, truth, repeats)


def sampled(scores: ScoreTable, repeats: int, rng: np.random.Generator) -> dict[tuple[str, int], Array]:
    """Both estimators from subsets of a table's rows, against the balanced estimate from all rows."""
    everything = scores.samples("balanced")
    probes = rng.dirichlet(np.ones(everything.num_objectives), size=30)
    truth = Truth(probes, objectives(everything, probes), solve(everything).weights[0], everything)
    number = len(scores.proposals)
    owner = np.repeat(np.arange(scores.num_prompts), np.diff(scores.starts))
    most = int(np.bincount(owner * number + scores.drawn_by).min())

    def draw(name: str, size: int) -> SampleTable:
        wanted = {0: size} if name == "paper" else dict.fromkeys(range(1, number), size // (number - 1))
        keys = rng.random(scores.num_rows)
        order = np.lexsort((keys, scores.drawn_by, owner))
        group = (owner * number + scores.drawn_by)[order]
        rank = np.arange(len(order)) - np.searchsorted(group, group)
        limit = np.array([wanted.get(code, 0) for code in range(number)])
        rows = np.sort(order[rank < limit[scores.drawn_by[order]]])
        ratios = scores.log_ratios[rows]
        share = np.zeros(len(rows))
        if name == "balanced":
            columns = [scores.objectives.index(p) for p in scores.proposals[1:]]
            share = log_proposal(ratios[:, columns], np.ones((len(rows), len(columns))))
        return SampleTable(ratios, share, np.searchsorted(rows, scores.starts))

    numbers = [n for n in NUMBERS if n <= most and n % (number - 1) == 0]
    return compare(draw, truth, repeats, numbers)


def compare(draw, truth: Truth, repeats: int, numbers=NUMBERS) -> dict[tuple[str, int], Array]:  # type: ignore[no-untyped-def]
    """(estimator, N) → (repeats, 4): error of F, regret, Σ|λ̂ − λ*|, ESS/N."""
    rows: dict[tuple[str, int], Array] = {}
    for name in ("paper", "balanced"):
        for number in numbers:
            found = []
            for _ in range(repeats):
                table = draw(name, number)
                fitted = solve(table).weights[0]
                share = np.median(effective_sample_size(table, fitted)) / number
                error = np.abs(objectives(table, truth.probes) - truth.values).mean()
                found.append([error, truth.regret(fitted), np.abs(fitted - truth.weights).sum(), share])
            rows[name, number] = np.array(found)
    return rows


COLUMNS = ("|F̂ − F|, nats", "F(λ̂) − F(λ*), nats", "Σ|λ̂ − λ*|", "ESS / N")


def report(title: str, results: dict[str, dict[tuple[str, int], Array]]) -> None:
    print(f"\n{title}: medians over repeats")
    print(f"{'':>16} {'N':>4}  " + "  ".join(f"{c:>26}" for c in COLUMNS))
    print(f"{'':>16} {'':>4}  " + "  ".join(f"{'paper   balanced   ratio':>26}" for _ in COLUMNS))
    for name, rows in results.items():
        for number in sorted({n for _, n in rows}):
            one, two = (np.median(rows[e, number], axis=0) for e in ("paper", "balanced"))
            cells = [f"{a:8.4f} {b:8.4f} {a / max(b, 1e-12):8.2f}" for a, b in zip(one, two, strict=True)]
            print(f"{name:>16} {number:>4}  " + "  ".join(f"{c:>26}" for c in cells))


def save(path: Path, results: dict[str, dict[tuple[str, int], Array]]) -> None:
    """Error of F, regret and effective samples against N, a column per distance from the reference."""
    shown = (0, 1, 3)
    figure = Figure(figsize=(3.1 * len(results) + 1.2, 7.2), layout="constrained")
    panels = figure.subplots(len(shown), len(results), sharex=True, sharey="row", squeeze=False)
    for column, (name, rows) in enumerate(results.items()):
        numbers = sorted({n for _, n in rows})
        for row, measure in enumerate(shown):
            axes = panels[row][column]
            plain(axes)
            axes.set_xscale("log", base=2)
            if measure != 3:
                axes.set_yscale("log")
            for index, estimator in enumerate(("paper", "balanced")):
                values = np.array([np.quantile(rows[estimator, n][:, measure], [0.5, 0.25, 0.75]) for n in numbers])
                values = values if measure == 3 else np.maximum(values, 1e-6)
                axes.plot(numbers, values[:, 0], color=COLOURS[index], marker=MARKERS[index], label=estimator)
                axes.fill_between(numbers, values[:, 1], values[:, 2], color=COLOURS[index], alpha=0.2, linewidth=0)
            axes.set_xticks(numbers, [str(n) for n in numbers])
            axes.minorticks_off()
        panels[0][column].set_title(name, fontsize=10)
        panels[-1][column].set_xlabel("samples per prompt, N")
    for row, measure in enumerate(shown):
        panels[row][0].set_ylabel(COLUMNS[measure])
    legend(figure, panels[0][0])
    path.write_bytes(png(figure))
    print(path)


if __name__ == "__main__":
    sys.exit(main())
