"""The warnings of a fit: each appears where its cause is, with its figures, and not elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mpo_ray.config import Fit, MirrorSteps
from mpo_ray.data.scores import ScoreTable
from mpo_ray.fitting.standalone import fit_scores
from tests.fitting.tables import scores, tables_of, worlds


def said(table: ScoreTable, *, draws: int = 0, estimator: str = "paper") -> list[str]:
    settings = Fit.model_validate({"method": "exact", "bootstrap_draws": draws, "estimator": estimator, "grid": 4})
    return list(fit_scores(table, settings, seed=0, method="exact")[0]["warnings"])


def only(found: list[str], start: str) -> str:
    matching = [text for text in found if text.startswith(start)]
    assert len(matching) == 1, found
    return matching[0]


def test_a_table_that_answers_the_question_has_no_warnings() -> None:
    """Mild policies, many samples and prompts, interior weights, balanced win rates, equal lengths."""
    rng = np.random.default_rng(0)
    log_ratios = rng.normal(0, 0.7, size=(200, 16, 2)) - 0.25
    assert said(tables_of(log_ratios, rewards=log_ratios, num_tokens=np.full((200, 16), 20)), draws=50) == []


def test_too_few_effective_samples_are_named_with_the_number_that_would_do() -> None:
    """The median, m, the m that would do, and the other estimator."""
    log_ratios = np.random.default_rng(0).normal(0, 2.2, size=(100, 6, 2)) - 1.0
    text = only(said(tables_of(log_ratios)), "The median effective sample size")
    assert "of 6 responses per prompt" in text
    assert "responses per prompt would do (samples.samples_per_prompt)" in text
    assert "fit.estimator: balanced" in text
    hopeless = np.random.default_rng(0).normal(0, 20.0, size=(100, 8, 2)) - 100.0
    assert "no practical number" in only(said(tables_of(hopeless)), "The median effective sample size").lower()
    balanced = said(scores(worlds(30, spread=6.0), each=2), estimator="balanced")
    assert all("estimator: balanced" not in text for text in balanced)


def test_weights_that_the_table_did_not_decide_are_not_blamed_on_it() -> None:
    """Given weights stay as they are: too few effective samples spoil only what the table says of them."""
    log_ratios = np.random.default_rng(0).normal(0, 3.0, size=(60, 6, 2)) - 2.0
    settings = Fit(method="fixed", weights={"warm": 0.5, "brief": 0.5}, bootstrap_draws=0, grid=4)
    found = fit_scores(tables_of(log_ratios), settings, seed=0, method="fixed")[0]["warnings"]
    text = only(list(found), "The median effective sample size")
    assert "what the table says of these weights" in text
    assert "decide these weights" not in text


def test_a_vertex_is_named_as_the_policy_that_it_is() -> None:
    """One objective far below the other under any mixture."""
    log_ratios = np.random.default_rng(0).normal(0, 0.3, size=(50, 12, 2)) + np.array([0.0, -3.0])
    assert "the policy 'brief' alone" in only(said(tables_of(log_ratios)), "The weights are at a vertex")


def test_prompts_that_do_not_determine_the_weights_are_named() -> None:
    """Policies that are nearly equal: any λ is as good, and the interval shows it."""
    rng = np.random.default_rng(0)
    one = rng.normal(0, 1.0, size=(30, 12, 1))
    log_ratios = np.concatenate([one, one + rng.normal(0, 0.02, size=one.shape)], axis=2)
    text = only(said(tables_of(log_ratios), draws=50), "The prompts do not determine")
    assert "interval of λ 'warm' is [0.0" in text


def test_weights_that_the_rewards_contradict_are_named_with_better_ones() -> None:
    """The policies' own rewards balance where the measured rewards do not: predicted minimum win rates of both."""
    rng = np.random.default_rng(0)
    log_ratios = rng.normal(0, 0.8, size=(200, 16, 2)) + np.array([-0.6, 0.0])
    rewards = np.stack([0.1 * log_ratios[..., 0] + rng.normal(size=(200, 16)), log_ratios[..., 1]], axis=-1)
    rewards[..., 1] -= 2.0 * log_ratios[..., 0]
    text = only(said(tables_of(log_ratios, rewards=rewards)), "These weights balance the normalised rewards")
    assert "predicted minimum win rate is 0." in text
    assert "fit.method: decoded" in text


def test_policies_that_differ_in_length_are_named() -> None:
    """Length decides when a response ends; the product of next-token distributions cannot foresee it."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, size=(200, 16))
    log_ratios = np.stack([-(lengths - 30) / 12.0, (lengths - 30) / 12.0], axis=-1) - 0.7
    text = only(said(tables_of(log_ratios, num_tokens=lengths)), "The policies differ in length")
    assert "warm" in text
    assert "brief" in text


def test_policies_that_are_one_and_the_same_are_named() -> None:
    """Nothing to choose: all equal, two equal, one that is the reference."""
    column = np.random.default_rng(3).normal(0, 0.5, size=(40, 8, 1))
    for same in (np.zeros((40, 8, 3)), np.repeat(column, 3, axis=2)):
        assert "every λ is an optimum" in only(said(tables_of(same)), "The log-ratios of all objectives are equal")
    other = np.random.default_rng(4).normal(0, 0.5, size=(40, 8, 1))
    text = only(said(tables_of(np.concatenate([column, other, column], axis=2))), "The log-ratios of 'warm' and")
    assert "'brief'" not in text
    assert "only the sum of their weights is determined" in text
    flat = np.concatenate([column, np.full_like(column, 0.3)], axis=2)
    assert "is the reference" in only(said(tables_of(flat)), "The log-ratio of 'brief' is the same")


def test_a_single_prompt_is_named() -> None:
    table = tables_of(np.random.default_rng(5).normal(0, 0.5, size=(1, 12, 2)))
    assert "have no interval" in only(said(table, draws=20), "The table has a single prompt")


def test_rewards_that_are_all_equal_are_named() -> None:
    log_ratios = np.random.default_rng(6).normal(0, 0.5, size=(40, 8, 2))
    rewards = np.stack([log_ratios[..., 0], np.zeros((40, 8))], axis=2)
    text = only(said(tables_of(log_ratios, rewards=rewards)), "The reward of 'brief' is the same for all samples")
    assert "½ whatever the weights" in text


@pytest.mark.parametrize(("scale", "offset", "far"), [(1e-6, 0.6, True), (1.0, 0.6, False), (1e6, 0.0, True)])
def test_a_descent_whose_steps_do_not_suit_the_scale_is_named_with_steps_that_do(
    scale: float, offset: float, far: bool
) -> None:
    """Steps are per nat. With the step_scale that is told, the descent comes near to the optimum."""
    log_ratios = scale * (np.random.default_rng(0).normal(size=(10, 6, 2)) + np.array([0.0, offset]))
    table = tables_of(log_ratios)
    settings = Fit(method="bsmd", bootstrap_draws=0, grid=3, bsmd=MirrorSteps(steps=400))
    found = list(fit_scores(table, settings, seed=0, method="bsmd")[0]["warnings"])
    texts = [text for text in found if text.startswith("The weights are far from the optimum")]
    assert len(texts) == far
    if far:
        told = float(texts[0].split("step_scale near ")[1].split(",")[0])
        suited = settings.model_copy(update={"bsmd": MirrorSteps(steps=400, step_scale=told)})
        found = list(fit_scores(table, suited, seed=0, method="bsmd")[0]["warnings"])
        assert not [text for text in found if text.startswith("The weights are far from the optimum")]


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
@pytest.mark.parametrize("method", ["exact", "bsmd", "fixed"])
def test_tables_at_the_edge_of_sense_are_fitted_with_finite_numbers(method: str, scale: float) -> None:
    """Two samples, opposite and collinear policies, offsets, all proposals: no traceback, no NaN, no numpy warning."""
    rng = np.random.default_rng(8)
    column = rng.normal(size=(5, 2, 1))
    weights = {"warm": 0.4, "brief": 0.6} if method == "fixed" else None
    settings = Fit(method=method, weights=weights, bootstrap_draws=5, grid=2, bsmd=MirrorSteps(steps=30))
    for pair in (column * [1.0, -1.0], column * [1.0, 2.0], column + np.array([0.0, 5.0]), column * [1.0, 0.0]):
        fit, trade_off = fit_scores(tables_of(scale * pair, rewards=0 * pair), settings, seed=0, method=method)
        json.dumps([fit, trade_off], allow_nan=False)
        assert sum(fit["weights"].values()) == pytest.approx(1.0)
        assert fit["warnings"]
