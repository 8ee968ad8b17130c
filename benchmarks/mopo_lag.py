"""MOPO's schedule, equation (13), over relaxation and lag: python benchmarks/mopo_lag.py [--quick]

The structures of `mopo_synthetic.py` with their true win probabilities, and the project's own online loop (λ, bounds
and lagged reference of `mpo_ray.training.multipliers`) on one logit per response. The bounded objectives start at what
π_ref has, and follow what was reached. Where the paper takes 10,000 steps and t0 of 1, 100, 1,000 and ∞, this takes a
fifth of each.

Prints, and draws into --out: what the last policy has of the primary objective and of the least bounded one, above
π_ref, and its KL from the first π_ref; medians over seeds.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from mopo_synthetic import TAU, parse_options, part_of, structure

from mpo_ray.config_training import ConstrainedTraining
from mpo_ray.drawing import COLOURS, MARKERS, legend, plain, png
from mpo_ray.maths.constrained import ratio
from mpo_ray.maths.pool import Pool
from mpo_ray.training.constrained import Problem, statistics
from mpo_ray.training.multipliers import Multipliers

Array = np.ndarray
STEPS, BATCH, RATE = 2000, 4, 0.5
LAGS = (1, 20, 200, None)
RELAXATIONS = (0.9, 0.95, 0.99, 0.999)
STRUCTURES = ("aligned", "opposed", "partly conflicting", "three objectives")


def trained(pool: Pool, *, lag: int | None, relaxation: float, seed: int) -> Array:
    """The loop of design 2.4 from λ = 0, and bounds at π_ref's values; returns log π_ψ of every response."""
    names = [f"bounded {j}" for j in range(pool.num_secondary)]
    problem = Problem(
        primary="primary",
        secondary=names,
        bounds=pool.expectation(pool.secondary).tolist(),
        adaptive=[True] * len(names),
        tau=TAU,
    )
    training = ConstrainedTraining(method="online", lag=lag, relaxation=relaxation)
    state, rng = Multipliers.start(problem), np.random.default_rng(seed)
    policy = pool.log_reference.reshape(pool.num_prompts, -1).copy()
    lagged, waiting = policy, policy
    for step in range(1, STEPS + 1):
        prompts = rng.choice(pool.num_prompts, BATCH, replace=False)
        first = part_of(pool, prompts)
        part = replace(first, log_reference=lagged[prompts].ravel())
        rho = ratio(part, state.multipliers, TAU)
        state = state.after(statistics(part, rho, first, state.log_chi), problem, training, step=step)
        target = (np.exp(part.log_reference) * rho).reshape(BATCH, -1)
        moved = policy[prompts] + RATE * (target - np.exp(policy[prompts]))  # −∂/∂ψ of equation (11)
        policy[prompts] = moved - np.logaddexp.reduce(moved, axis=1, keepdims=True)
        if lag is not None and step % lag == 0:
            lagged, waiting = waiting, policy.copy()
    return policy.ravel()


def figures_of(pool: Pool, log_policy: Array) -> tuple[float, float, float]:
    """Primary and least secondary above π_ref's, in units of win probability; KL from π_ref, nats."""
    gains = np.exp(log_policy - pool.log_reference) - 1.0
    primary = float(pool.expectation(gains * pool.primary))
    secondary = float(pool.expectation(gains[:, None] * pool.secondary).min())
    return primary, secondary, float(pool.expectation((1.0 + gains) * (log_policy - pool.log_reference)))


def main() -> int:
    options = parse_options("mopo_lag", __doc__, quick="one relaxation")
    relaxations, seeds = RELAXATIONS[:1] if options.quick else RELAXATIONS, options.seeds
    found: dict[tuple[str, int | None, float], Array] = {}
    print(f"{'':>20} {'t0':>5} {'relaxation':>11} {'primary':>9} {'bounded':>9} {'KL, nats':>9}")
    for name in STRUCTURES:
        pools = [structure(name, seed).pool for seed in range(seeds)]
        for lag in LAGS:
            for relaxation in relaxations if lag else (1.0,):  # without a lag the bounds stay where they are
                runs = [
                    figures_of(pool, trained(pool, lag=lag, relaxation=relaxation, seed=seed))
                    for seed, pool in enumerate(pools)
                ]
                found[name, lag, relaxation] = np.array(runs)
                primary, bounded, kl = np.median(runs, axis=0)
                cells = f"{lag or '∞':>5} {relaxation if lag else '':>11} {primary:+9.3f} {bounded:+9.3f} {kl:9.2f}"
                print(f"{name:>20} {cells}", flush=True)
    draw(found, options.out / "mopo_lag.png")
    return 0


def draw(found: dict[tuple[str, int | None, float], Array], path: Path) -> None:
    """A panel per structure: primary against the least bounded objective, a colour per t0, a marker per relaxation."""
    figure = Figure(figsize=(3.2 * len(STRUCTURES), 3.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(STRUCTURES), sharey=True, squeeze=False)[0], STRUCTURES, strict=True):
        plain(axes)
        axes.axvline(0.0, color="black", linewidth=0.8)
        for (own, lag, relaxation), runs in found.items():
            if own == name:
                marker = MARKERS[RELAXATIONS.index(relaxation) if lag else 0]
                style = {"color": COLOURS[LAGS.index(lag)], "marker": marker}
                label = f"t0 = {lag}, {relaxation:g}" if lag else "t0 = ∞"
                axes.plot(np.median(runs[:, 1]), np.median(runs[:, 0]), linestyle="", label=label, **style)
        axes.margins(x=0.15)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("least bounded, above π_ref")
    figure.axes[0].set_ylabel("primary, above π_ref")
    legend(figure, figure.axes[0])
    path.write_bytes(png(figure))
    print(path)


if __name__ == "__main__":
    sys.exit(main())
