"""MOPO on small preference structures whose front is known exactly: python benchmarks/mopo_synthetic.py [--quick]

Five structures over a small set of responses: objectives that agree, are opposed, or conflict in part, three of
them, and one whose preferences run in a cycle. The front of (8) is the exact solver swept over the bounds. Then
N pairs of responses are drawn and labelled, win probabilities are estimated from the labels, and the paper's stochastic
updates (design 2.4, eqs. 9 to 11) train a policy of one logit per response, as Lagrangian and as barrier.

Prints, and draws into --out: how far the policy's true values lie below the front (in the unit of (8)'s objective), and
by how much a bound is missed, against N; medians over seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.special import expit

from mpo_ray.drawing import COLOURS, MARKERS, legend, plain, png
from mpo_ray.maths.constrained import (
    barrier_multipliers,
    dual,
    multiplier_step,
    ratio,
    solve_lagrangian,
)
from mpo_ray.maths.feasibility import feasibility
from mpo_ray.maths.pool import Pool
from mpo_ray.maths.win_probability import win_probabilities_from_labels

Array = np.ndarray
NUM_PROMPTS, NUM_RESPONSES, TAU, SIGMA, DELTA = 8, 10, 0.08, 0.01, 0.002
NUMBERS = (100, 300, 1000, 3000, 10_000, 30_000)
#: How far from what the reference has to the best that can be reached the bounds are set, as shares.
SHARES = (-0.3, -0.15, 0.0, 0.15, 0.3)
STRUCTURES = ("aligned", "opposed", "partly conflicting", "three objectives", "intransitive")


@dataclass(frozen=True)
class Structure:
    """P(y_i ≻ y_j) for every prompt and objective, (P, K, m, m), primary first; log π_ref, (P, m)."""

    wins: Array
    log_reference: Array

    @property
    def pool(self) -> Pool:
        """The true p̄ and q̄_j: opponents come from π_ref."""
        means = np.einsum("pkij,pj->pik", self.wins, np.exp(self.log_reference)).reshape(-1, self.wins.shape[1])
        return self.pool_of(means)

    def pool_of(self, means: Array) -> Pool:
        """A pool with these win probabilities (P·m, K)."""
        starts = np.arange(len(self.log_reference) + 1) * self.log_reference.shape[1]
        return Pool(means[:, 0], means[:, 1:], self.log_reference.ravel(), starts)


def structure(name: str, seed: int) -> Structure:
    """A random structure of its kind."""
    rng = np.random.default_rng([seed, STRUCTURES.index(name)])
    shape = (NUM_PROMPTS, NUM_RESPONSES)
    first = rng.normal(0, 1.5, shape)
    others = {
        "aligned": [0.9 * first + 0.5 * rng.normal(size=shape)],
        "opposed": [-first],
        "partly conflicting": [-0.5 * first + rng.normal(0, 1.2, shape)],
        "three objectives": [-0.4 * first + rng.normal(0, 1.2, shape), rng.normal(0, 1.5, shape)],
        "intransitive": [],
    }[name]
    wins = [_bradley_terry(scores) for scores in (first, *others)]
    if name == "intransitive":  # three groups, each of which beats the next with 0.8; within a group scores decide
        group = rng.integers(0, 3, shape)
        step = (group[:, None, :] - group[:, :, None]) % 3
        within = _bradley_terry(rng.normal(size=shape))
        wins.append(np.where(step == 0, within, np.where(step == 1, 0.8, 0.2)))
    reference = rng.normal(0, 0.7, shape)
    return Structure(np.stack(wins, axis=1), reference - np.logaddexp.reduce(reference, axis=1, keepdims=True))


def _bradley_terry(scores: Array) -> Array:
    return expit(scores[:, :, None] - scores[:, None, :])


def bounds_of(pool: Pool, share: float) -> Array:
    """Between what π_ref has (share 0) and the best of each objective (1), or below (negative)."""
    reference = pool.expectation(pool.secondary)
    best = feasibility(pool, np.zeros(pool.num_secondary)).best
    return np.asarray(reference + share * (best - reference))


def below_front(pool: Pool, rho: Array) -> float:
    """How much more (8) allows a policy that has the same secondary values: V(E[ρ q̄]) − (E[ρ p̄] − τ KL) ≥ 0."""
    secondary = pool.expectation(rho[:, None] * pool.secondary)
    return solve_lagrangian(pool, secondary - 1e-9, tau=TAU).dual_value - objective(pool, rho)


def objective(pool: Pool, rho: Array) -> float:
    """E[ρ p̄] − τ KL, what (8) maximises."""
    return float(pool.expectation(rho * pool.primary - TAU * rho * np.log(np.maximum(rho, 1e-300))))


def estimated(given: Structure, num_pairs: int, rng: np.random.Generator) -> Pool:
    """Win probabilities from `num_pairs` pairs of π_ref, labelled for all objectives; ½ where nothing is known."""
    prompts, size = given.log_reference.shape
    prompt = rng.integers(0, prompts, num_pairs)
    cumulative = np.cumsum(np.exp(given.log_reference), axis=1)
    drawn = [(rng.uniform(size=num_pairs)[:, None] > cumulative[prompt]).sum(axis=1) for _ in range(2)]
    left, right = (np.minimum(side, size - 1) for side in drawn)
    kept = left != right  # a response is not compared with itself
    prompt, left, right = prompt[kept], left[kept], right[kept]
    means = []
    for k in range(given.wins.shape[1]):
        won = rng.uniform(size=len(prompt)) < given.wins[prompt, k, left, right]
        winners, losers = np.where(won, left, right), np.where(won, right, left)
        shares = win_probabilities_from_labels(
            prompt * size + winners, prompt * size + losers, np.ones(len(prompt)), prompts * size
        )
        means.append(np.nan_to_num(shares, nan=0.5))
    own = np.exp(given.log_reference).ravel()[:, None]
    # p̄ counts the opponent that equals the response as a tie, as P(y ≻ y) = ½ does.
    return given.pool_of((1 - own) * np.stack(means, axis=1) + own * 0.5)


def part_of(pool: Pool, prompts: Array) -> Pool:
    """The candidates of some prompts of a structure's pool, where every prompt has as many."""
    size = len(pool.primary) // pool.num_prompts
    rows = (prompts[:, None] * size + np.arange(size)).ravel()
    starts = np.arange(len(prompts) + 1) * size
    return Pool(pool.primary[rows], pool.secondary[rows], pool.log_reference[rows], starts)


def updates(
    pool: Pool, bounds: Array, variant: str, rng: np.random.Generator, *, steps: int = 4000, batch: int = 4
) -> Array:
    """The paper's loop on a pool: λ, then ψ, from a few prompts a step; returns ρ = π_ψ/π_ref, of averaged logits."""
    logits, averaged = pool.log_reference.reshape(pool.num_prompts, -1).copy(), 0.0
    multipliers, means = np.zeros(len(bounds)), pool.expectation(pool.secondary)
    for t in range(1, steps + 1):
        prompts = rng.choice(pool.num_prompts, batch, replace=False)
        part = part_of(pool, prompts)
        rho = ratio(part, multipliers, TAU)
        values = part.expectation(rho[:, None] * part.secondary)
        if variant == "lagrangian":
            multipliers = multiplier_step(multipliers, values, bounds, 1.0 / np.sqrt(t))
        else:
            means += (values - means) / min(t, 50)  # a batch's G is too noisy to divide by
            multipliers += (barrier_multipliers(means, bounds, SIGMA, DELTA) - multipliers) / np.sqrt(t)
        target = (np.exp(part.log_reference) * rho).reshape(batch, -1)
        current = np.exp(logits[prompts] - np.logaddexp.reduce(logits[prompts], axis=1, keepdims=True))
        logits[prompts] += 4.0 / np.sqrt(1 + t / 50) * (target - current)  # −∂/∂ψ of equation (11)
        if t > steps // 2:
            averaged = averaged + logits / (steps - steps // 2)
    policy = np.exp(averaged - np.logaddexp.reduce(averaged, axis=1, keepdims=True))
    return np.asarray(policy.ravel() / np.exp(pool.log_reference))


def exact_distance(pool: Pool) -> float:
    """The largest distance of exact solutions from the front, certified from above by the dual at other λ."""
    worst = 0.0
    for share in SHARES:
        bounds = bounds_of(pool, share)
        if feasibility(pool, bounds).worst is not None:
            continue
        found = solve_lagrangian(pool, bounds, tau=TAU)
        grid = np.linspace(0.98, 1.02, 9)
        upper = min(dual(pool, found.multipliers * scale, bounds, TAU)[0] for scale in grid)
        worst = max(worst, abs(upper - objective(pool, found.ratio)), float((bounds - found.secondary).max()))
    return worst


def parse_options(name: str, about: str | None, *, quick: str) -> argparse.Namespace:
    """Where the figures of a benchmark on these structures go, which is made, and how many seeds it takes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="directory for the figures")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help=f"one seed, {quick}")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.quick:
        options.seeds = 1
    return options


def main() -> int:
    options = parse_options("mopo_synthetic", __doc__, quick="few numbers of samples")
    numbers, seeds = NUMBERS[1::3] if options.quick else NUMBERS, options.seeds
    results: dict[str, dict[tuple[str, int], Array]] = {}
    print(f"exact solves: the largest distance from the front\n{'':>20}{'distance':>12}")
    for name in STRUCTURES:
        print(f"{name:>20}{max(exact_distance(structure(name, seed).pool) for seed in range(seeds)):12.1e}")
    print(f"\n{'':>20} {'N':>6}  {'below the front':>24}  {'bound missed by':>24}")
    print(f"{'':>20} {'':>6}  {'lagrangian':>12}{'barrier':>12}  {'lagrangian':>12}{'barrier':>12}")
    for name in STRUCTURES:
        results[name] = measure(name, numbers, seeds)
        for number in numbers:
            cells = [np.median(results[name][v, number], axis=0) for v in ("lagrangian", "barrier")]
            columns = "".join(f"{cell[0]:12.4f}" for cell in cells) + "  " + "".join(f"{c[1]:12.4f}" for c in cells)
            print(f"{name:>20} {number:>6}  {columns}", flush=True)
    draw_errors(results, numbers, options.out / "mopo_synthetic.png")
    draw_fronts(options.out / "mopo_fronts.png", numbers[-1])
    return 0


def measure(name: str, numbers: tuple[int, ...], seeds: int) -> dict[tuple[str, int], Array]:
    """(variant, N) → (seeds · bounds, 2): distance below the true front, and the largest violation of a true bound."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for seed in range(seeds):
        given = structure(name, seed)
        for number in numbers:
            rng = np.random.default_rng([seed, number])
            pool = estimated(given, number, rng)
            for share in SHARES:
                bounds = bounds_of(given.pool, share)
                if feasibility(pool, bounds).worst is not None:
                    continue
                for variant in ("lagrangian", "barrier"):
                    rho = updates(pool, bounds, variant, rng)
                    missed = bounds - given.pool.expectation(rho[:, None] * given.pool.secondary)
                    entry = below_front(given.pool, rho), float(np.maximum(missed, 0.0).max())
                    found.setdefault((variant, number), []).append(entry)
    return {key: np.array(rows) for key, rows in found.items()}


def draw_errors(results: dict[str, dict[tuple[str, int], Array]], numbers: tuple[int, ...], path: Path) -> None:
    """Distance and violation against the number of labelled pairs, a column per structure."""
    figure = Figure(figsize=(3.0 * len(results), 5.6), layout="constrained")
    panels = figure.subplots(2, len(results), sharex=True, sharey="row", squeeze=False)
    for column, (name, rows) in enumerate(results.items()):
        for row in range(2):
            axes = panels[row][column]
            plain(axes)
            axes.set_xscale("log")
            axes.set_yscale("symlog", linthresh=1e-4)
            for index, variant in enumerate(("lagrangian", "barrier")):
                values = np.array([np.quantile(rows[variant, n][:, row], [0.5, 0.25, 0.75]) for n in numbers])
                axes.plot(numbers, values[:, 0], color=COLOURS[index], marker=MARKERS[index], label=variant)
                axes.fill_between(numbers, values[:, 1], values[:, 2], color=COLOURS[index], alpha=0.2, linewidth=0)
            axes.set_ylim(bottom=0.0)
        panels[0][column].set_title(name, fontsize=10)
        panels[1][column].set_xlabel("labelled pairs, N")
    panels[0][0].set_ylabel("below the front")
    panels[1][0].set_ylabel("bound missed by")
    legend(figure, panels[0][0])
    path.write_bytes(png(figure))
    print(path)


def draw_fronts(path: Path, number: int) -> None:
    """The exact front of each structure with one bound, and what the stochastic updates reach from N pairs."""
    names = [name for name in STRUCTURES if name != "three objectives"]
    figure = Figure(figsize=(3.2 * len(names), 3.8), layout="constrained")
    sweep: Callable[[Pool, Array], Array] = lambda pool, b: solve_lagrangian(pool, b, tau=TAU).ratio  # noqa: E731
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        plain(axes)
        given = structure(name, 0)
        front = np.array(
            [
                _values(given.pool, sweep(given.pool, bounds_of(given.pool, share)))
                for share in np.linspace(-0.9, 0.97, 60)
            ]
        )
        axes.plot(front[:, 1], front[:, 0], color="black", linewidth=1.2, label="exact")
        rng = np.random.default_rng(0)
        pool = estimated(given, number, rng)
        for index, variant in enumerate(("lagrangian", "barrier")):
            points = [
                _values(given.pool, updates(pool, bounds_of(given.pool, share), variant, rng)) for share in SHARES
            ]
            found = np.array(points)
            axes.plot(
                found[:, 1], found[:, 0], MARKERS[index], color=COLOURS[index], label=f"{variant}, N = {number:,}"
            )
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("secondary: E[ρ q̄]")
    figure.axes[0].set_ylabel("primary: E[ρ p̄]")
    legend(figure, figure.axes[0])
    path.write_bytes(png(figure))
    print(path)


def _values(pool: Pool, rho: Array) -> tuple[float, float]:
    return float(pool.expectation(rho * pool.primary)), float(pool.expectation(rho * pool.secondary[:, 0]))


if __name__ == "__main__":
    sys.exit(main())
