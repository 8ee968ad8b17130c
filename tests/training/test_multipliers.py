"""The loop of λ, χ and the bounds on candidates alone: where it goes, and when it stops (design 2.4)."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from mpo_ray.config_training import ConstrainedTraining
from mpo_ray.maths.constrained import RunawayError, ratio, solve_barrier, solve_lagrangian
from mpo_ray.maths.robust import robust_bound
from mpo_ray.training.constrained import Problem, Statistics, pool_of, statistics
from mpo_ray.training.multipliers import DELTA, DegenerateRatioError, Multipliers, check_ratio
from tests.training.candidates import PROBLEM, candidates

EXAMPLES = candidates(12, seed=4)
POOL = pool_of(EXAMPLES)


def _training(**changes: object) -> ConstrainedTraining:
    return ConstrainedTraining.model_validate({"method": "online", "multiplier_step": 1.0, **changes})


def _problem(**changes: object) -> Problem:
    return Problem.model_validate({**PROBLEM.model_dump(), **changes})


def _loop(problem: Problem, training: ConstrainedTraining, steps: int, *, batch: int = 12) -> list[Multipliers]:
    """The states after each step, prompts drawn afresh for each."""
    rng, state, states = np.random.default_rng(0), Multipliers.start(problem), []
    for step in range(1, steps + 1):
        pool = pool_of([EXAMPLES[i] for i in rng.permutation(12)[:batch]])
        rho = ratio(pool, state.multipliers, problem.tau)
        state = state.after(statistics(pool, rho, pool, state.log_chi), problem, training, step=step)
        states.append(state)
    return states


def _found(values: tuple[float, float]) -> Statistics:
    return Statistics(0.6, np.array(values), np.full((2, 2), 0.5), 0.5, 0.1)


def test_lambda_approaches_the_optimum_of_the_pool() -> None:
    """λ of all prompts at a time is λ* of `solve_lagrangian`; from a few at a time it is so on average."""
    best = solve_lagrangian(POOL, np.array(PROBLEM.bounds), tau=PROBLEM.tau)
    assert best.multipliers[0] > 0.1  # the bound binds
    assert _loop(PROBLEM, _training(), 300)[-1].multipliers == pytest.approx(best.multipliers, abs=1e-4)
    noisy = _loop(PROBLEM, _training(multiplier_step=0.05), 4000, batch=3)[500:]
    assert np.mean([s.multipliers for s in noisy], axis=0) == pytest.approx(best.multipliers, abs=0.05)
    assert noisy[-1].values == pytest.approx(best.secondary, abs=0.03)


def test_the_barriers_lambda_approaches_its_optimum() -> None:
    problem = _problem(variant="barrier", sigma=0.02)
    best = solve_barrier(POOL, np.array(problem.bounds), tau=problem.tau, sigma=0.02, delta=DELTA)
    assert _loop(problem, _training(), 400)[-1].multipliers == pytest.approx(best.multipliers, abs=1e-4)


def test_chi_and_the_value_approach_those_of_the_robust_bound() -> None:
    """At rest, G_j is the robust bound of ρ q̄_j, and equals b_j where λ_j > 0."""
    problem = _problem(radius=0.002)
    last = _loop(problem, _training(), 800)[-1]
    rho = ratio(POOL, last.multipliers, problem.tau)
    for j, column in enumerate(POOL.secondary.T):
        exact = robust_bound(POOL.joint_log_reference, rho * column, 0.002)
        assert np.exp(last.log_chi[j]) == pytest.approx(exact.chi, rel=1e-3)
        assert last.values[j] == pytest.approx(exact.value, abs=1e-5)
    assert last.values[0] == pytest.approx(problem.bounds[0], abs=1e-4)
    assert last.multipliers[0] > _loop(PROBLEM, _training(), 300)[-1].multipliers[0]  # the radius has its price


def test_an_adaptive_bound_becomes_what_was_reached_t0_steps_before() -> None:
    """b ← relaxation · G of t0 steps ago (eq. 13): nothing at the first turn, since nothing was reached at step 0."""
    training = _training(lag=10, relaxation=0.9)
    states = _loop(PROBLEM, training, 31)
    for step, state in enumerate(states, start=1):
        reached = None if step < 20 else states[step // 10 * 10 - 11].values[1]
        assert state.bounds[0] == PROBLEM.bounds[0]  # is not adaptive
        assert state.bounds[1] == (PROBLEM.bounds[1] if reached is None else pytest.approx(0.9 * reached))


def test_a_multiplier_that_runs_away_is_named() -> None:
    state = replace(Multipliers.start(PROBLEM), multipliers=np.array([99.9, 3.0]))
    with pytest.raises(RunawayError, match=r"harmless: its multiplier reached 100,.*Lower the bound") as raised:
        state.after(_found((0.2, 0.6)), PROBLEM, _training(), step=7)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_a_ratio_that_rests_on_too_few_candidates_is_refused() -> None:
    state = Multipliers.start(PROBLEM).after(_found((0.6, 0.6)), PROBLEM, _training(), step=1)
    check_ratio(state, step=1, least=0.5)
    with pytest.raises(DegenerateRatioError, match=r"step 1: ρ rests on 50\.0%.*= 51\.0%.*Raise tau") as raised:
        check_ratio(state, step=1, least=0.51)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_the_state_is_the_same_after_a_checkpoint() -> None:
    for state in (Multipliers.start(PROBLEM), _loop(_problem(radius=0.01), _training(lag=2), 5, batch=5)[-1]):
        again = Multipliers.of_json(state.as_json())
        for name in state.__slots__:
            before, after = getattr(state, name), getattr(again, name)
            assert (before is None and after is None) or np.array_equal(before, after), name


def test_nothing_is_multiplied_where_nothing_is_bounded() -> None:
    problem = Problem(primary="helpful", secondary=[], bounds=[], adaptive=[], tau=0.2)
    found = Statistics(0.6, np.zeros(0), np.zeros((0, 2)), 0.5, 0.1)
    state = Multipliers.start(problem).after(found, problem, _training(lag=1), step=1)
    assert state.multipliers.shape == (0,)
    assert Statistics.of_array(found.as_array()).moments.shape == (0, 2)
