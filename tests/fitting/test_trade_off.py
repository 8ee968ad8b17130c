"""The predicted trade-off: the grid, and predictions against sums over every response."""

from __future__ import annotations

import numpy as np
import pytest

from mpo_ray.data.scores import scores_from_table
from mpo_ray.fitting.trade_off import MOST_POINTS, best_minimum, grid_of, minimum_win_rate, predict_trade_off
from tests.fitting.tables import NAMES, reward, score_rows, scores, worlds


@pytest.mark.parametrize(("num_objectives", "steps"), [(1, 10), (2, 10), (3, 10), (8, 10), (16, 10)])
def test_the_grid_is_even_holds_the_vertices_and_stays_small(num_objectives: int, steps: int) -> None:
    """Every multiple of 1/steps on the simplex, once; fewer steps where these are too many."""
    grid = grid_of(num_objectives, steps)
    assert len(grid) <= MOST_POINTS
    assert len({tuple(row) for row in grid.round(9)}) == len(grid)
    np.testing.assert_allclose(grid.sum(axis=1), 1.0)
    assert grid.min() >= 0.0
    for vertex in np.eye(num_objectives):
        assert (np.abs(grid - vertex).max(axis=1) < 1e-12).any()
    assert len(grid) == {1: 1, 2: 11, 3: 66, 8: 120, 16: 136}[num_objectives]


def test_predictions_are_the_enumerated_rewards_win_rates_lengths_and_divergences() -> None:
    """E_{π_λ}[r], P(r(y) > r(y')) + ½ P(=) against π_ref, E[length], KL: from samples, to sums over every response."""
    of = worlds(6, spread=1.5)
    point = {"warm": 0.2, "brief": 0.5, "exact": 0.3}
    found = predict_trade_off(scores(of, each=300), [point], estimator="balanced", draws=20, confidence=0.9, seed=0)[
        "points"
    ][0]
    lengths, divergences = [], []
    rates: dict[str, list[float]] = {name: [] for name in NAMES}
    means: dict[str, list[float]] = {name: [] for name in NAMES}
    for world in of:
        mixture, reference = np.exp(world.log_mixture(np.array(list(point.values())))), np.exp(world.log_reference)
        lengths.append(mixture @ [len(y) for y in world.responses])
        divergences.append(mixture @ (world.log_mixture(np.array(list(point.values()))) - world.log_reference))
        for name in NAMES:
            values = np.array([reward(name, y) for y in world.responses])
            means[name].append(mixture @ values)
            wins = (values[:, None] > values) + 0.5 * (values[:, None] == values)
            rates[name].append(mixture @ wins @ reference)
    for name in NAMES:
        assert found["rewards"][name][0] == pytest.approx(np.mean(means[name]), abs=0.05)
        assert found["win_rates"][name][0] == pytest.approx(np.mean(rates[name]), abs=0.03)
    assert found["num_tokens"][0] == pytest.approx(np.mean(lengths), abs=0.05)
    assert found["kl"][0] == pytest.approx(np.mean(divergences), abs=0.05)
    assert found["kl"][1] < found["kl"][0] < found["kl"][2]
    assert found["reliable"] is True


def test_what_the_table_does_not_hold_is_left_out() -> None:
    """Without rewards no rewards and win rates, without the reference's responses no win rates; KL always."""
    bare = scores_from_table(score_rows(worlds(4), each=4, rewards=False).drop_columns("num_tokens"))
    point = predict_trade_off(bare, [{"warm": 1.0}], estimator="balanced", draws=0, confidence=0.9, seed=0)["points"][0]
    assert set(point) == {"weights", "kl", "effective_sample_size", "reliable"}
    assert len(point["kl"]) == 1
    alone = scores_from_table(score_rows(worlds(4), each=4, proposals=NAMES))
    point = predict_trade_off(alone, [{"warm": 1.0}], estimator="balanced", draws=0, confidence=0.9, seed=0)["points"][
        0
    ]
    assert "rewards" in point
    assert "win_rates" not in point


def test_a_prediction_that_rests_on_too_few_samples_says_so() -> None:
    """Policies far from the reference, 4 samples of it: the effective sample size at a vertex nears 1."""
    far = scores(worlds(20, spread=5.0), each=4, proposals=("reference",))
    found = predict_trade_off(far, [{"warm": 1.0}], estimator="paper", draws=0, confidence=0.9, seed=0)["points"][0]
    assert found["effective_sample_size"] < 4.0
    assert found["reliable"] is False


def test_the_best_minimum_is_that_of_the_reliable_point_whose_worst_objective_is_best() -> None:
    """max over reliable λ of min_k W_k."""
    points = [
        {"reliable": True, "win_rates": {"a": [0.6], "b": [0.4]}},
        {"reliable": True, "win_rates": {"a": [0.5], "b": [0.45]}},
        {"reliable": False, "win_rates": {"a": [0.9], "b": [0.9]}},
    ]
    best = best_minimum({"points": points})
    assert best is points[1]
    assert minimum_win_rate(points[1]) == 0.45
    assert best_minimum({"points": [{"reliable": True}]}) is None
