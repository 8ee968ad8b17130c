"""MOPO on two DeepSpeed workers: the steps of a plain program, one state on every worker, and a run that was killed."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpo_ray.cluster.trainable import load_trainable
from mpo_ray.policies.loading import load_model
from mpo_ray.training.order import batch_indices
from tests.cluster.constrained_workers import CASES, HELDOUT, STEPS, TRAIN, WORLD, problem_of, training_of
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.tiny_run import ROOT, environment
from tests.training.candidates import fixed_logprobs, logprobs

pytestmark = pytest.mark.slow
BROKEN = [case for case, (*_, broken) in CASES.items() if broken]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("base"), tiny_tokenizer(), seed=0))


@pytest.fixture(scope="module")
def results(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers left behind: unbroken, then resumed by new processes from the checkpoints of the first."""
    out = tmp_path_factory.mktemp("results")
    _run_workers(base, out, "unbroken", list(CASES))
    _run_workers(base, out, "resumed", BROKEN)
    return out


def _run_workers(base: str, out: Path, kind: str, cases: list[str]) -> None:
    commands = [
        [sys.executable, "-m", "tests.cluster.constrained_workers", base, str(out), str(rank), kind, json.dumps(cases)]
        for rank in range(WORLD)
    ]
    workers = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), cwd=ROOT)
        for c in commands
    ]
    try:
        printed = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * WORLD, "\n".join(printed)


def _read(out: Path, case: str, kind: str = "unbroken", rank: int = 0) -> dict[str, Any]:
    return dict(torch.load(out / f"{case}-{kind}-{rank}.pt"))


def _plain(base: str, case: str) -> dict[str, Any]:
    """The whole loop in one process, with a model for every set of weights: plain torch and numpy, no engine.

    λ and χ of a step come from the steps before it. At step 0, t0, 2 t0, … the lagged policy becomes what the policy
    was t0 steps before, at first what it began as.
    """
    training, problem = training_of(case), problem_of(case)
    reference = load_model(base)
    policy = load_trainable(base, training, seed=0).train()
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    lag, tau, radius = training.lag or STEPS, problem.tau, problem.radius
    lam, bounds = np.zeros(2), np.array(problem.bounds)
    log_chi = np.full(2, np.log(0.25 / np.sqrt(2 * radius)) if radius else 0.0)
    policies, averages, losses, states = [copy.deepcopy(policy)], [], [], []
    for step in range(STEPS):
        lagged = policies[max(0, step // lag - 1) * lag]
        batch = [TRAIN[i] for i in batch_indices(step, num_examples=len(TRAIN), batch_size=4, seed=0)]
        seen, loss = [], torch.zeros(())
        for given in batch:
            moved = np.exp(given.log_reference + fixed_logprobs(lagged, given) - fixed_logprobs(reference, given))
            shares = moved / moved.sum()
            tilt = np.exp((given.primary + given.secondary @ lam) / tau)
            rho = tilt / (shares @ tilt)
            seen.append((shares, rho, given))
            loss = loss - (torch.tensor(shares * rho).float() * logprobs(policy, given)).sum() / 4
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), training.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        policies.append(copy.deepcopy(policy))
        if training.values_of == "policy":
            seen = []
            for given in [HELDOUT[(2 * step + i) % len(HELDOUT)] for i in range(2)]:
                first = np.exp(given.log_reference)
                moved = first * np.exp(fixed_logprobs(policy, given) - fixed_logprobs(reference, given))
                seen.append((first, moved / moved.sum() / first, given))
        chi, values, mass, slope = np.exp(log_chi), np.zeros(2), np.zeros(2), np.zeros(2)
        for shares, rho, given in seen:
            won = rho[:, None] * given.secondary
            values += shares @ won / len(seen)
            mass += shares @ np.exp(-won / chi) / len(seen)
            slope += shares @ (np.exp(-won / chi) * won / chi) / len(seen)
        if radius:
            values = -chi * (np.log(mass) + radius)
        lam = np.maximum(lam - training.multiplier_step * (values - bounds), 0.0)
        if radius:
            kl = -np.log(mass) - slope / mass
            log_chi = log_chi + training.chi_step * np.clip(kl / radius - 1, -1, 1)
        span = min(step + 1, lag)
        averages.append(values if not averages else averages[-1] + (values - averages[-1]) / span)
        if (step + 1) % lag == 0 and step + 1 >= 2 * lag:
            bounds = np.where(problem.adaptive, training.relaxation * averages[step - lag], bounds)
        losses.append(float(loss.detach()))
        states.append((lam, log_chi, bounds))
    weights = {name: p.detach() for name, p in trained.items()}
    lagged = dict(policies[max(0, STEPS // lag - 1) * lag].named_parameters())
    heldout = []
    for given in HELDOUT:
        moved = np.exp(given.log_reference + fixed_logprobs(policy, given) - fixed_logprobs(reference, given))
        shares = moved / moved.sum()
        kl = shares @ (np.log(shares) - given.log_reference)
        heldout.append([shares @ given.primary, *(shares @ given.secondary), kl])
    return {
        "losses": losses,
        "states": states,
        "trained": weights,
        "lagged": {name: lagged[name].detach() for name in weights},
        "heldout": np.mean(heldout, axis=0),
    }


@pytest.mark.parametrize("case", list(CASES))
def test_two_workers_take_the_steps_of_a_plain_program(base: str, results: Path, case: str) -> None:
    """Loss, λ, χ, bounds, weights and lagged weights after every step, for every ZeRO stage; and held-out figures."""
    found, expected = _read(results, case), _plain(base, case)
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    for state, (multipliers, log_chi, bounds) in zip(found["states"], expected["states"], strict=True):
        assert state["multipliers"] == pytest.approx(multipliers, abs=1e-5)
        assert state["log_chi"] == pytest.approx(log_chi, abs=1e-5)
        assert state["bounds"] == pytest.approx(bounds, abs=1e-5)
    for kind in ("trained", "lagged"):
        names = [name for name in found if name.startswith(kind)]
        assert len(names) == len(expected[kind])
        for name in names:
            assert torch.allclose(found[name], expected[kind][name.partition(" ")[2]], atol=1e-5), name
    figures = [found["heldout"][name] for name in ("primary", "value_harmless", "value_concise", "kl")]
    assert figures == pytest.approx(expected["heldout"], abs=1e-5)


@pytest.mark.parametrize("case", list(CASES))
def test_the_steps_go_somewhere_and_the_lag_is_in_force(results: Path, case: str) -> None:
    """Or the tests beside this one would compare nothing with nothing."""
    found = _read(results, case)
    assert max(found["states"][-1]["multipliers"]) > 0.1
    assert found["states"][-1]["bounds"] != problem_of(case).bounds
    names = [name.partition(" ")[2] for name in found if name.startswith("trained")]
    moved = max(float((found[f"trained {n}"] - found[f"lagged {n}"]).abs().max()) for n in names)
    assert moved > 1e-4
    assert not any("lagged" in name for name in found["exported"])


@pytest.mark.parametrize("case", list(CASES))
def test_every_worker_has_the_same_state(results: Path, case: str) -> None:
    first, second = (_read(results, case, rank=rank) for rank in range(WORLD))
    assert first["states"] == second["states"]
    assert first["heldout"] == second["heldout"]


@pytest.mark.parametrize("case", BROKEN)
def test_a_killed_run_ends_where_the_unbroken_one_does(results: Path, case: str) -> None:
    """λ, χ, bounds, what waits to be a bound, the lagged weights and the order of the prompts, to the last bit."""
    unbroken, resumed = (_read(results, case, kind) for kind in ("unbroken", "resumed"))
    assert resumed["states"] == unbroken["states"][-len(resumed["states"]) :]
    assert resumed["losses"] == unbroken["losses"][-len(resumed["losses"]) :]
    for name, value in unbroken.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed[name]), name
