"""Batch stochastic mirror descent: equation (5) step by step, and what it converges to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_ray.maths.exact_fit import solve
from mpo_ray.maths.mirror_descent import batch_stochastic_mirror_descent, mirror_descent, trace
from mpo_ray.maths.partition import gradient, objective
from mpo_ray.maths.sample_table import SampleTable
from mpo_ray.maths.simplex import exponentiated_gradient_step, uniform
from tests.world import Array

SEEDS = range(6)


@pytest.fixture(scope="module")
def cases(shared: Path) -> list[dict[str, Any]]:
    return list(json.loads((shared / "vectors" / "mpo.json").read_text())["cases"])


def named(cases: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(case for case in cases if case["name"] == name)


def mean_excess(table: SampleTable, least: float, num_steps: int, step_scale: float = 1.0) -> float:
    """E[F(λ̄_T)] − F(λ*) over SEEDS, F that of the table."""
    fits = [
        batch_stochastic_mirror_descent(
            table, step_scale=step_scale, num_steps=num_steps, rng=np.random.default_rng(seed)
        )
        for seed in SEEDS
    ]
    return float(np.mean([objective(table, fit.average) for fit in fits])) - least


def test_each_step_is_equation_5_and_the_answer_is_the_average() -> None:
    """λ_1 = 1/K; v̂ = Σ_j w_j ℓ(x_t, y_tj); λ ← λ exp(−η v̂)/norm; η = c/√T; λ̄ = mean of λ_1 … λ_T."""
    table = np.random.default_rng(0).normal(size=(6, 4, 3))
    num_steps, step_scale = 50, 1.7
    fit = batch_stochastic_mirror_descent(
        SampleTable.of_reference(table),
        step_scale=step_scale,
        num_steps=num_steps,
        rng=np.random.default_rng(9),
    )

    prompts = np.random.default_rng(9).integers(6, size=num_steps)
    weights, visited = np.full(3, 1 / 3), []
    for prompt in prompts:
        visited.append(weights)
        tilted = np.array([np.exp(sum(weights[k] * table[prompt, j, k] for k in range(3))) for j in range(4)])
        estimate = (tilted / tilted.sum()) @ table[prompt]
        unnormalized = weights * np.exp(-step_scale / np.sqrt(num_steps) * estimate)
        weights = unnormalized / unnormalized.sum()

    assert fit.step_size == pytest.approx(1.7 / np.sqrt(50))
    np.testing.assert_allclose(fit.iterates, [*visited, weights], atol=1e-12)
    np.testing.assert_allclose(fit.average, np.mean(visited, axis=0), atol=1e-12)


def test_the_error_keeps_the_bound_of_mirror_descent(cases: list[dict[str, Any]]) -> None:
    """E[F(λ̄)] − F(λ*) ≤ (log K / c + c R²/8)/√T, R the largest spread of ℓ over objectives at one response.

    v̂ is an unbiased gradient of the table's F, so regret of exponentiated gradient (Hoeffding's lemma) bounds it.
    """
    for case in cases:
        table = SampleTable.of_reference(np.array(case["log_ratios_sampled"]))
        spread = float(np.ptp(table.log_ratios, axis=1).max())
        for num_steps in (100, 1000):
            bound = (np.log(table.num_objectives) + spread**2 / 8) / np.sqrt(num_steps)
            assert -1e-9 <= mean_excess(table, case["objective"], num_steps) <= bound + 1e-9, case["name"]


def test_the_distance_to_the_optimum_falls_like_one_over_the_square_root_of_the_steps(
    cases: list[dict[str, Any]],
) -> None:
    """O(1/√T) (eq. 5): the slope of log E[F(λ̄_T)] − F(λ*) against log T is −½ or steeper over T = 100 … 10,000."""
    numbers = np.array([100, 1000, 10_000])
    for name in ("two_objectives", "three_interior", "eight_objectives"):
        case = named(cases, name)
        table = SampleTable.of_reference(np.array(case["log_ratios_sampled"]))
        excess = [mean_excess(table, case["objective"], number) for number in numbers]
        slope = np.polyfit(np.log(numbers), np.log(excess), 1)[0]
        assert -1.3 < slope < -0.4, (name, slope, excess)


def test_the_error_falls_with_the_number_of_steps(cases: list[dict[str, Any]]) -> None:
    """O(1/√T): a hundred times the steps leave at most a fifth of the error."""
    for name in ("two_objectives", "three_interior", "mostly_agreeing", "eight_objectives", "strong_policies"):
        case = named(cases, name)
        table = SampleTable.of_reference(np.array(case["log_ratios_sampled"]))
        few, many = (mean_excess(table, case["objective"], num_steps) for num_steps in (100, 10_000))
        assert 0 <= many < few / 5, (name, few, many)


def test_with_many_steps_the_answer_is_the_optimum_of_the_table(cases: list[dict[str, Any]]) -> None:
    """F(λ̄) − F(λ*) < 0.005 nats at T = 10 000 on every table whose log-ratios are a few nats, λ̄ near a unique λ*."""
    for case in cases:
        table = SampleTable.of_reference(np.array(case["log_ratios_sampled"]))
        if np.abs(table.log_ratios).max() > 10:
            continue
        fit = batch_stochastic_mirror_descent(table, step_scale=1.0, num_steps=10_000, rng=np.random.default_rng(1))
        assert objective(table, fit.average) - case["objective"] < 5e-3, case["name"]
        if case.get("unique_weights", True):
            np.testing.assert_allclose(fit.average, case["weights"], atol=0.06, err_msg=case["name"])


def exact_excess(case: dict[str, Any], *, num_steps: int, num_samples: int) -> float:
    """E[F_exact(λ̄)] − min F_exact over SEEDS: F_exact sums over every response, BSMD sees m of them per prompt."""
    log_reference = np.array(case["log_ref"])
    ratios = np.array(case["log_policies"]) - log_reference[..., None]
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        drawn = [rng.choice(len(row), size=num_samples, p=np.exp(row)) for row in log_reference]
        table = np.stack([rows[chosen] for rows, chosen in zip(ratios, drawn, strict=True)])
        fit = batch_stochastic_mirror_descent(
            SampleTable.of_reference(table), step_scale=1.0, num_steps=num_steps, rng=rng
        )
        found.append(exact_objective(log_reference, ratios, fit.average))
    return float(np.mean(found)) - exact_objective(log_reference, ratios, exact_optimum(log_reference, ratios))


def test_the_answer_tends_to_the_exact_optimum_as_steps_and_samples_grow(cases: list[dict[str, Any]]) -> None:
    """F_exact(λ̄) − min F_exact is O(1/√T) + O(1/m): small only where both are many, and then below 0.001 nats."""
    for name in ("three_interior", "mostly_agreeing", "eight_objectives"):
        case = named(cases, name)
        few_steps = exact_excess(case, num_steps=30, num_samples=4000)
        few_samples = exact_excess(case, num_steps=3000, num_samples=3)
        both = exact_excess(case, num_steps=3000, num_samples=4000)
        assert -1e-9 <= both < 1e-3, (name, few_steps, few_samples, both)
        assert both < min(few_steps, few_samples) / 5, (name, few_steps, few_samples, both)


def exact_objective(log_reference: Array, log_ratios: Array, weights: Array) -> float:
    return float(np.logaddexp.reduce(log_reference + log_ratios @ weights, axis=1).mean())


def exact_optimum(log_reference: Array, log_ratios: Array) -> Array:
    """λ* by full-gradient mirror steps on the enumerated distributions."""
    log_weights = np.log(uniform(log_ratios.shape[2]))
    for _ in range(3000):
        tilt = log_reference + log_ratios @ np.exp(log_weights)
        mixture = np.exp(tilt - np.logaddexp.reduce(tilt, axis=1)[:, None])
        slope = np.einsum("bs,bsk->k", mixture, log_ratios) / len(log_ratios)
        log_weights = exponentiated_gradient_step(log_weights, slope, 0.5)
    return np.asarray(np.exp(log_weights))


def test_one_response_per_prompt_is_refused_because_it_always_ends_at_a_vertex() -> None:
    """For m = 1, F(λ) = E_x Σ_k λ_k ℓ_k is linear: its gradient is the same at every λ."""
    table = SampleTable.of_reference(np.random.default_rng(0).normal(size=(8, 1, 3)))
    np.testing.assert_allclose(gradient(table, uniform(3)), gradient(table, np.array([1.0, 0.0, 0.0])))
    with pytest.raises(ValueError, match=r"m = 1 .* linear"):
        batch_stochastic_mirror_descent(table, step_scale=1.0, num_steps=10, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("shape", "num_steps", "step_scale", "complaint"),
    [
        ((3, 2), 10, 1.0, r"shape \(3, 2\)"),
        ((0, 2, 2), 10, 1.0, r"shape \(0, 2, 2\)"),
        ((3, 2, 2), 0, 1.0, "num_steps is 0"),
        ((3, 2, 2), 10, -1.0, "step_scale -1.0"),
    ],
)
def test_arguments_without_a_meaning_are_refused(
    shape: tuple[int, ...], num_steps: int, step_scale: float, complaint: str
) -> None:
    """B, m, K ≥ 1, T ≥ 1, c > 0."""
    with pytest.raises(ValueError, match=complaint):
        batch_stochastic_mirror_descent(
            SampleTable.of_reference(np.zeros(shape)),
            step_scale=step_scale,
            num_steps=num_steps,
            rng=np.random.default_rng(0),
        )


def test_policies_far_from_the_reference_leave_finite_weights() -> None:
    """Log-ratios of thousands of nats: the exponentials are taken relative to their largest."""
    table = SampleTable.of_reference(2000 * np.random.default_rng(0).normal(size=(5, 8, 3)))
    fit = batch_stochastic_mirror_descent(table, step_scale=1.0, num_steps=200, rng=np.random.default_rng(0))
    np.testing.assert_allclose(fit.iterates.sum(axis=1), 1.0)


def test_a_step_over_every_prompt_follows_the_gradient_and_more_prompts_a_step_err_less() -> None:
    """Mirror descent on the table is (5) with v̂ = ∇F; a mini-batch's v̂ has less noise than one prompt's."""
    table = SampleTable.of_reference(np.random.default_rng(0).normal([0.1, 0.0, -0.1], size=(40, 6, 3)))
    full = mirror_descent(table, step_scale=2.0, num_steps=30)
    eta = 2.0 / np.sqrt(30)
    np.testing.assert_allclose(
        np.log(full.iterates[1]),
        exponentiated_gradient_step(np.log(uniform(3)), gradient(table, uniform(3)), eta),
        atol=1e-12,
    )
    np.testing.assert_allclose(full.average, full.iterates[:-1].mean(axis=0))

    def spread(prompts_per_step: int) -> float:
        fits = [
            batch_stochastic_mirror_descent(
                table,
                step_scale=2.0,
                num_steps=30,
                prompts_per_step=prompts_per_step,
                rng=np.random.default_rng(seed),
            ).average
            for seed in range(30)
        ]
        return float(np.std(fits, axis=0).mean())

    assert spread(16) < spread(1) / 2.5
    many = batch_stochastic_mirror_descent(
        table, step_scale=2.0, num_steps=30, prompts_per_step=4000, rng=np.random.default_rng(0)
    )
    np.testing.assert_allclose(many.average, full.average, atol=0.01)


def test_the_trace_tells_what_the_answer_would_have_been_after_each_step() -> None:
    """Row s: λ̄ of the first s iterates, F(λ̄) and gap(λ̄) on the whole table; the gap bounds F(λ̄) − F(λ*)."""
    table = SampleTable.of_reference(np.random.default_rng(0).normal([0.5, 0.0, -0.5], size=(20, 5, 3)))
    fit = batch_stochastic_mirror_descent(table, step_scale=2.0, num_steps=400, rng=np.random.default_rng(1))
    steps = np.array([1, 20, 400])
    found = trace(table, steps, fit.running_averages(steps))
    np.testing.assert_allclose(found.weights[0], uniform(3))
    np.testing.assert_allclose(found.weights[-1], fit.average)
    assert found.objective[1] == pytest.approx(objective(table, fit.iterates[:20].mean(axis=0)))
    least = objective(table, solve(table).weights[0])
    assert np.all(found.gap >= found.objective - least)
    assert found.gap[-1] < found.gap[0] / 5
