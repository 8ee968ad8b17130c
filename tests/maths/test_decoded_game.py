"""The game on what is decoded: its steps are equation (6b), its answer the max–min of the real gains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import erf

import numpy as np
import pytest

from mpo_ray.maths.decoded_game import (
    WIN_RATE_PER_DEVIATION,
    Observations,
    answer,
    next_weights,
    num_mirror_steps,
    weight_intervals,
)
from mpo_ray.maths.gain_model import GainModel, maximin
from tests.world import Array, Response, Table, World, prefixes, sequence_logprobs

#: Gains (S, K) at weights (S, K).
Game = Callable[[Array], Array]
NUM_STEPS, STEP_SCALE, ERROR = 10, 6.0, 0.015


def grid(num_objectives: int, steps: int) -> Array:
    """Every λ whose entries are multiples of 1/steps."""
    if num_objectives == 1:
        return np.array([[1.0]])
    rest = np.array(np.meshgrid(*[np.arange(steps + 1)] * (num_objectives - 1))).reshape(num_objectives - 1, -1).T
    rest = rest[rest.sum(axis=1) <= steps]
    return np.column_stack([rest, steps - rest.sum(axis=1)]) / steps


def played(game: Game, num_objectives: int, *, error: float, seed: int, with_policies: bool = True) -> Observations:
    """T steps with noisy gains; returns what the answer is made from."""
    rng = np.random.default_rng(seed)

    def observe(weights: Array) -> Observations:
        return Observations(
            weights, game(weights) + error * rng.normal(size=weights.shape), np.full(weights.shape, error)
        )

    none = Observations.none(num_objectives)
    policies = observe(np.eye(num_objectives)) if with_policies else none
    steps = none
    for _ in range(NUM_STEPS):
        steps = steps.and_also(observe(next_weights(steps, policies, num_steps=NUM_STEPS, step_scale=STEP_SCALE)[None]))
    return steps.and_also(policies)


def regret(game: Game, weights: Array, *, steps: int) -> float:
    """max min_k g_k over a fine grid − min_k g_k(λ)."""
    return float(game(grid(len(weights), steps)).min(axis=1).max() - game(weights[None]).min())


@dataclass(frozen=True)
class DecodedWorld:
    """Exact gains of the token-level mixture in an enumerable world: E_q[ℓ_k], in its standard deviations."""

    world: World

    def __call__(self, weights: Array) -> Array:
        return np.array([self._gains(row) for row in weights])

    def _gains(self, weights: Array) -> Array:
        q: Table = {}
        for prefix in prefixes(self.world.num_tokens, self.world.max_tokens):
            with np.errstate(invalid="ignore"):
                mixed = sum(w * table[prefix] for w, table in zip(weights, self.world.policies, strict=True))
            q[prefix] = np.asarray(mixed - np.logaddexp.reduce(mixed))
        responses: list[Response] = self.world.responses
        probabilities = np.exp(sequence_logprobs(q, responses))
        ratios = self.world.log_ratios
        shifted = probabilities @ ratios - np.exp(self.world.log_reference) @ ratios
        return np.asarray(WIN_RATE_PER_DEVIATION * shifted / ratios.std(axis=0))


def win_rates(strengths: Array) -> Game:
    """Win rate − ½ when the shift of reward k, in its standard deviations, is Σ_j A_kj λ_j."""
    phi = np.vectorize(lambda x: 0.5 * (1 + erf(x / np.sqrt(2))))
    return lambda weights: phi(weights @ strengths.T) - 0.5


def test_the_mirror_steps_are_equation_6b() -> None:
    """λ_1 = 1/K; λ_{t+1} ∝ λ_t exp(−c/√t g(λ_t)); the last third of the steps is spent at the answer so far."""
    gains = np.array([[0.3, -0.1, 0.0], [0.1, 0.2, -0.2], [0.05, 0.0, 0.02], [0.0, 0.1, 0.0]])
    policies = Observations(np.eye(3), np.full((3, 3), 0.01), np.full((3, 3), 0.01))
    expected, visited = np.full(3, 1 / 3), []
    for t in range(1, 5):
        visited.append(expected)
        seen = Observations(np.array(visited[:-1]).reshape(-1, 3), gains[: t - 1], np.full((t - 1, 3), 0.01))
        found = next_weights(seen, policies, num_steps=6, step_scale=2.5)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        expected = expected * np.exp(-2.5 / np.sqrt(t) * gains[t - 1])
        expected /= expected.sum()
    assert num_mirror_steps(6) == 4
    seen = Observations(np.array(visited), gains, np.full((4, 3), 0.01))
    found = next_weights(seen, policies, num_steps=6, step_scale=2.5)
    np.testing.assert_allclose(found, answer(seen, policies).weights, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_with_exact_gains_the_game_ends_at_the_max_min_of_what_is_decoded(seed: int) -> None:
    """min_k g_k(λ̂) is within 0.01 of the best λ of a fine grid, K = 2 and 3, whatever the token-level mixture does."""
    for num_policies, steps in ((2, 100), (3, 30)):
        game = DecodedWorld(World.random(seed, num_policies=num_policies))
        found = answer(played(game, num_policies, error=0.0, seed=0), Observations.none(num_policies))
        assert regret(game, found.weights, steps=steps) < 0.01, (seed, num_policies)


def test_the_gains_at_the_answer_are_equal_where_all_bind() -> None:
    """An interior max–min of opposed objectives: g_1 = g_2 = g_3 there, to the model's accuracy."""
    game = win_rates(np.array([[0.9, -0.3, -0.2], [-0.3, 1.2, -0.4], [-0.1, -0.3, 0.6]]))
    found = answer(played(game, 3, error=0.0, seed=0), Observations.none(3)).weights
    assert found.min() > 0.1
    assert np.ptp(game(found[None])) < 0.01


def random_strengths(num_objectives: int, seed: int) -> Array:
    """What policies do in practice: lift their own objective, more or less, and lower the others a little."""
    rng = np.random.default_rng(seed)
    strengths = rng.normal(-0.15, 0.2, (num_objectives, num_objectives))
    np.fill_diagonal(strengths, rng.uniform(0.3, 1.4, num_objectives))
    return strengths


@pytest.mark.parametrize(("num_objectives", "steps", "most"), [(2, 100, 0.01), (3, 40, 0.015), (4, 20, 0.025)])
def test_noisy_gains_cost_little_and_less_than_the_average_does(num_objectives: int, steps: int, most: float) -> None:
    """Mean loss of min_k g_k over 6 games with standard error 0.015: below the noise of one gain, and the average's."""
    losses = []
    for seed in range(6):
        game = win_rates(random_strengths(num_objectives, seed))
        seen = played(game, num_objectives, error=ERROR, seed=seed)
        mirror = seen.weights[: num_mirror_steps(NUM_STEPS)].mean(axis=0)
        found = answer(seen, Observations.none(num_objectives)).weights
        losses.append([regret(game, weights, steps=steps) for weights in (found, mirror)])
    ours, average = np.mean(losses, axis=0)
    assert ours < most
    assert ours < average


def test_a_policy_that_harms_its_own_objective_gets_no_weight() -> None:
    """g_1 falls with λ_1: the game alone gives λ_1 nearly all, as objective 1 is worst; the answer gives it none."""
    game = win_rates(np.array([[-0.4, -0.05, -0.05], [0.0, 0.8, -0.3], [0.0, -0.3, 0.8]]))
    for seed in range(3):
        seen = played(game, 3, error=ERROR, seed=seed)
        found = answer(seen, Observations.none(3)).weights
        assert seen.weights[num_mirror_steps(NUM_STEPS) - 1, 0] > 0.6
        assert found[0] < 0.1
        assert regret(game, found, steps=40) < 0.02


def test_an_objective_that_no_policy_lifts_does_not_spoil_the_others() -> None:
    """g_1 = −0.02 everywhere: no λ does better, and the answer loses nothing by trying."""
    game = win_rates(np.array([[-0.05, -0.05, -0.05], [-0.2, 0.8, -0.3], [-0.2, -0.3, 0.8]]))
    found = answer(played(game, 3, error=ERROR, seed=1), Observations.none(3)).weights
    assert regret(game, found, steps=40) < 0.01


def test_without_the_policies_own_gains_the_answer_stays_among_the_points_that_were_visited() -> None:
    """λ̂ is in the convex hull of the steps' λ, K = 2: between the smallest and the largest λ_1."""
    game = win_rates(random_strengths(2, 0))
    seen = played(game, 2, error=ERROR, seed=0, with_policies=False)
    found = answer(seen, Observations.none(2)).weights
    assert seen.weights[:, 0].min() - 2e-3 <= found[0] <= seen.weights[:, 0].max() + 2e-3
    assert regret(game, found, steps=100) < 0.03


def test_the_slope_of_the_model_is_the_derivative_of_its_mean() -> None:
    rng = np.random.default_rng(0)
    points, at, shares = rng.dirichlet(np.ones(3), 8), rng.dirichlet(np.ones(3), 4), rng.dirichlet(np.ones(3), 4)
    model = GainModel(points, rng.normal(0, 0.2, (8, 3)), np.full((8, 3), 0.01))
    for k in range(3):
        move = 1e-5 * np.eye(3)[k]
        difference = ((model.mean(at + move) - model.mean(at - move)) * shares).sum(axis=1) / 2e-5
        np.testing.assert_allclose(model.slope(at, shares)[:, k], difference, atol=1e-6)


def test_the_maximin_of_a_linear_game_is_that_of_its_vertices() -> None:
    """g = Aλ with A = diag(a): λ_k ∝ 1/a_k equalises, and no λ has a larger minimum."""
    strengths = np.array([0.4, 0.2, 0.1])
    points = np.vstack([np.eye(3), grid(3, 4)])
    found = maximin(GainModel(points, points * strengths, np.full(points.shape, 1e-3)))
    np.testing.assert_allclose(found, (1 / strengths) / (1 / strengths).sum(), atol=0.02)


def test_the_models_errors_cover_the_truth_between_its_points() -> None:
    """|mean − g| < 3 errors at 200 points of a smooth game; at a vertex that was seen the error is the noise's."""
    game = win_rates(random_strengths(3, 4))
    seen = played(game, 3, error=ERROR, seed=2)
    model = GainModel(seen.weights, seen.gains, seen.errors)
    at = np.random.default_rng(0).dirichlet(np.ones(3), 200)
    assert (np.abs(model.mean(at) - game(at)) < 3 * model.error(at)).mean() > 0.98
    assert (model.error(np.eye(3)) < 1.1 * ERROR).all()


def test_intervals_hold_the_answer_and_shrink_with_the_noise() -> None:
    game = win_rates(random_strengths(3, 1))
    widths = []
    for error in (0.03, 0.005):
        seen = played(game, 3, error=error, seed=0)
        bounds = weight_intervals(seen, Observations.none(3), draws=30, confidence=0.9, rng=np.random.default_rng(0))
        found = answer(seen, Observations.none(3)).weights
        assert (bounds[:, 0] - 0.03 <= found).all()
        assert (found <= bounds[:, 1] + 0.03).all()
        widths.append(np.ptp(bounds, axis=1).mean())
    assert widths[1] < 0.5 * widths[0]


def test_gains_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="the gains of an observed game are finite"):
        GainModel(np.eye(2), np.array([[0.1, np.nan], [0.0, 0.2]]), np.full((2, 2), 0.01))
