"""Which distribution each mode draws from, over the shared worlds: q token by token, π_λ by the exact modes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from mpo_ray.decoding.protocol import Diagnostics, Mode
from mpo_ray.maths.log_linear import log_normalizer, mix_logprobs
from tests.world import Response
from tests.world_runner import engine_of, responses, tables

TOKEN, REJECTION = Mode(), Mode("rejection", particles=4, max_attempts=10_000)
#: The χ² test passes above this p.
PASSES = 1e-4


@pytest.fixture(scope="module")
def cases(shared: Path) -> list[dict[str, Any]]:
    return list(json.loads((shared / "vectors" / "sequence.json").read_text())["cases"])


def drawn(case: dict[str, Any], mode: Mode, num: int) -> tuple[list[Response], list[Diagnostics]]:
    found, last = responses(engine_of(tables(case)), case["weights"], mode, num=num, max_tokens=case["max_tokens"])
    return found, [delta.diagnostics for delta in last if delta.diagnostics is not None]


def p_value(found: Sequence[Response], case: dict[str, Any], level: str) -> float:
    """χ² of the counts against the exact probabilities; sequences that are expected less than 5 times are one cell."""
    counts = Counter(found)
    expected = np.exp(case[f"{level}_level_logprob"]) * len(found)
    observed = np.array([counts[tuple(sequence)] for sequence in case["sequences"]], dtype=float)
    assert observed.sum() == len(found)
    rare = expected < 5
    cells = [np.append(values[~rare], values[rare].sum()) for values in (observed, expected)]
    return float(chisquare(cells[0], cells[1] * cells[0].sum() / cells[1].sum()).pvalue)


def test_token_mode_draws_from_the_token_level_mixture_and_from_no_other(cases: list[dict[str, Any]]) -> None:
    """P(y) = q(y) (eq. 7); the same draws against π_λ show that the test can fail."""
    for case in cases:
        found, _ = drawn(case, TOKEN, 8000)
        assert p_value(found, case, "token") > PASSES
        assert p_value(found, case, "sequence") < PASSES


def test_rejection_draws_from_the_sequence_level_mixture(cases: list[dict[str, Any]]) -> None:
    """P(y) = π_λ(y); an attempt is accepted with probability Z, so that attempts are 1/Z on average."""
    for case in cases:
        found, diagnostics = drawn(case, REJECTION, 4000)
        assert p_value(found, case, "sequence") > PASSES
        attempts = np.array([one.attempts for one in diagnostics], dtype=float)
        z = np.exp(case["log_partition"])
        assert attempts.mean() == pytest.approx(1 / z, abs=4 * np.sqrt((1 - z) / z**2 / len(attempts)))


def test_many_particles_draw_from_the_sequence_level_mixture(cases: list[dict[str, Any]]) -> None:
    """64 particles pass the test that token mode fails; E Ẑ = Z."""
    for case in cases:
        found, diagnostics = drawn(case, Mode("smc", 64), 500)
        assert p_value(found, case, "sequence") > PASSES
        z_hat = np.exp([one.log_z_hat for one in diagnostics])
        z = np.exp(case["log_partition"])
        assert z_hat.mean() == pytest.approx(z, abs=4 * z_hat.std() / np.sqrt(len(z_hat)))


def test_the_error_of_particles_falls_like_one_over_their_number(cases: list[dict[str, Any]]) -> None:
    """P_N(A) − π_λ(A) ≈ c/N on the event A = {π_λ > q}, where the error of one particle is the total variation."""
    case = cases[2]
    exact, token = (np.exp(case[f"{level}_level_logprob"]) for level in ("sequence", "token"))
    event = {tuple(y) for y, more in zip(case["sequences"], exact > token, strict=True) if more}
    wanted = exact[exact > token].sum()

    def error(particles: int) -> float:
        found, _ = drawn(case, Mode("smc", particles), 3000)
        return float(wanted - np.mean([y in event for y in found]))

    assert error(1) == pytest.approx(case["total_variation"], abs=0.03)
    numbers = np.array([2, 4, 8])
    errors = np.array([error(n) for n in numbers])
    slope = np.polyfit(np.log(numbers), np.log(errors), 1)[0]
    assert -1.6 < slope < -0.8, errors


def sharpened(case: dict[str, Any], factor: float) -> dict[str, Any]:
    """The case with `factor` times its weights: its exact values by enumeration, and particles that differ early."""
    policies, weights = tables(case), factor * np.array(case["weights"])
    log_q, log_z = [], []
    for sequence in case["sequences"]:
        rows = torch.tensor(
            np.array([[policy[tuple(sequence[:t])] for t in range(len(sequence))] for policy in policies])
        )
        mixed = mix_logprobs(rows, torch.from_numpy(weights))
        factors = log_normalizer(mixed)
        log_q.append(float((mixed.gather(1, torch.tensor(sequence)[:, None])[:, 0] - factors).sum()))
        log_z.append(float(factors.sum()))
    total = np.logaddexp.reduce(np.add(log_q, log_z))
    return case | {
        "weights": weights.tolist(),
        "token_level_logprob": log_q,
        "sequence_level_logprob": np.add(log_q, log_z) - total,
        "sum_log_z": log_z,
        "log_partition": total,
    }


def test_particles_that_are_resampled_early_and_often_draw_from_the_sequence_level_mixture(
    cases: list[dict[str, Any]],
) -> None:
    """Twice λ (any λ will do): particles move to others' lanes before the second, third and fourth token."""
    sharp = sharpened(cases[2], 2.0)
    found, diagnostics = drawn(sharp, Mode("smc", 64), 600)
    assert p_value(found, sharp, "sequence") > PASSES
    assert p_value(found, sharp, "token") < PASSES
    exact = {tuple(y): value for y, value in zip(sharp["sequences"], sharp["sum_log_z"], strict=True)}
    np.testing.assert_allclose([one.log_z for one in diagnostics], [exact[y] for y in found], atol=1e-9)


def test_what_is_reported_of_a_sequence_is_its_own(cases: list[dict[str, Any]]) -> None:
    """Σ_t log Z_t of the tokens that came out, in every mode, whatever was resampled or given up on the way."""
    for case in cases:
        exact = {tuple(y): value for y, value in zip(case["sequences"], case["sum_log_z"], strict=True)}
        for mode in (TOKEN, REJECTION, Mode("smc", 8)):
            found, diagnostics = drawn(case, mode, 200)
            sums = [one.log_z for one in diagnostics]
            np.testing.assert_allclose(sums, [exact[y] for y in found], atol=1e-9)
