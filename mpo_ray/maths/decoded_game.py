"""The max–min game on what is really decoded: which λ to decode next, and which one to answer   (design 2.2, eq. 6b)

Gains come from outside, as estimates with standard errors, in units of win rate. Knows nothing of models or rewards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpo_ray.maths.gain_model import GainModel, maximin
from mpo_ray.maths.simplex import Array, exponentiated_gradient_step
from mpo_ray.maths.statistics import interval

#: A shift by one standard deviation is worth 1/(2√π) of win rate at parity: d/dδ Φ(δ/√2) at δ = 0.
WIN_RATE_PER_DEVIATION = 1.0 / (2.0 * np.sqrt(np.pi))


@dataclass(frozen=True, slots=True, eq=False)
class Observations:
    """Gains at N points in the order they were observed; N may be 0.

    weights: (N, K) λ; gains: (N, K) ĝ_k(λ); errors: (N, K) their standard errors
    """

    weights: Array
    gains: Array
    errors: Array

    @classmethod
    def none(cls, num_objectives: int) -> Observations:
        empty = np.zeros((0, num_objectives))
        return cls(empty, empty, empty)

    def and_also(self, other: Observations) -> Observations:
        return Observations(
            np.concatenate([self.weights, other.weights]),
            np.concatenate([self.gains, other.gains]),
            np.concatenate([self.errors, other.errors]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The fit's λ, and what the model expects there.

    weights: (K,) λ; gains: (K,) E[g_k(λ)]; errors: (K,) their standard deviations
    average: (K,) the plain average of the steps' λ, the form of equations (5) and (6b)
    """

    weights: Array
    gains: Array
    errors: Array
    average: Array


def num_mirror_steps(num_steps: int) -> int:
    """How many of T steps are mirror steps: the last third (rounded down) is spent at the answer so far."""
    return num_steps - num_steps // 3


def next_weights(steps: Observations, policies: Observations, *, num_steps: int, step_scale: float) -> Array:
    """λ_{t+1} after t steps: the mirror steps first, then the answer so far, to see whether it holds   (eq. 6b)

        λ_1 = 1/K,   λ_{t+1,k} ∝ λ_{t,k} exp(−η_t g_k(λ_t)),   η_t = c/√t

    steps: what the t steps observed; policies: what is known at vertices (see `answer`)
    step_scale: c, per unit of win rate. Depends on its arguments alone, so a broken-off game goes on where it was.

    A heuristic game: it rests where all objectives with positive weight gain alike and the others more. With exact
    gradients of F in the place of g that is the max–min; for token-level gains it need not be, for example when an
    objective's own policy lowers it. That is why its average is not the answer.
    """
    if len(steps.weights) >= num_mirror_steps(num_steps):
        return answer(steps, policies).weights
    log_weights = np.full(steps.weights.shape[1], -np.log(steps.weights.shape[1]))
    for t, gains in enumerate(steps.gains, start=1):
        log_weights = exponentiated_gradient_step(log_weights, gains, step_scale / np.sqrt(t))
    return np.asarray(np.exp(log_weights))


def answer(steps: Observations, policies: Observations) -> Answer:
    """The λ with the largest minimum of the gains that all observations together suggest   (`maximin`)

    steps: N ≥ 1 steps of the game
    policies: gains at vertices, which need no game: a vertex decodes as its policy alone, whose samples are in the
        table of scores where the policies are proposals; none where they are not

    Why not the average of the iterates: in simulated games (win rates Φ(Aλ + bend) − ½, standard error 0.015, c = 6,
    T = 10; K = 2, 3, 8; tests/maths/test_decoded_game.py) it still leans on its start, and where one objective
    cannot be lifted the game itself ends at the wrong place. The regression uses every step, and maximises the minimum.

    Samples are not shared between steps by importance weights: over whole responses the weights of neighbouring q_λ
    spread as in (6a) without its bound, and every reweighting needs all K next-token distributions again. The model
    shares the gains themselves, which costs nothing and tolerates any distance.
    """
    everything = steps.and_also(policies)
    model = GainModel(everything.weights, everything.gains, everything.errors)
    weights = maximin(model)
    return Answer(weights, model.mean(weights[None])[0], model.error(weights[None])[0], steps.weights.mean(axis=0))


def weight_intervals(
    steps: Observations, policies: Observations, *, draws: int, confidence: float, rng: np.random.Generator
) -> Array:
    """Percentile intervals of λ, (K, 2), when all gains are drawn again with normal noise of their standard errors.

    A parametric bootstrap at the points that were visited: that other gains would have led elsewhere is left out.
    """
    everything = steps.and_also(policies)
    model = GainModel(everything.weights, everything.gains, everything.errors)
    found = np.stack([maximin(model.redrawn(rng)) for _ in range(draws)])
    return np.array([interval(column, confidence) for column in found.T])
