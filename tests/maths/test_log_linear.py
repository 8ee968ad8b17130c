"""The token-level mixture: the shared vectors, and equation (7)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpo_ray.maths.log_linear import log_normalizer, mix_logprobs


@pytest.fixture(scope="module")
def cases(shared: Path) -> list[dict[str, Any]]:
    return list(json.loads((shared / "vectors" / "sequence.json").read_text())["cases"])


def along(case: dict[str, Any], sequence: list[int]) -> tuple[float, float]:
    """log q(y) and Σ_t log Z_t of one sequence, from the mixture of the tables' rows."""
    rows = [[table[json.dumps(sequence[:t])] for t in range(len(sequence))] for table in case["next_token_logprobs"]]
    mixed = mix_logprobs(torch.tensor(rows, dtype=torch.float64), torch.tensor(case["weights"], dtype=torch.float64))
    log_z = log_normalizer(mixed)
    chosen = mixed.gather(-1, torch.tensor(sequence)[:, None]).squeeze(-1)
    return (chosen - log_z).sum().item(), log_z.sum().item()


def test_token_level_logprobs_and_normalisers_equal_the_shared_vectors(cases: list[dict[str, Any]]) -> None:
    """log q(y) = Σ_t (Σ_k λ_k log π_k(y_t|y_<t) − log Z_t)."""
    for case in cases:
        found = np.array([along(case, sequence) for sequence in case["sequences"]])
        np.testing.assert_allclose(found[:, 0], case["token_level_logprob"], atol=1e-9)
        np.testing.assert_allclose(found[:, 1], case["sum_log_z"], atol=1e-9)


def test_the_two_mixtures_differ_by_the_normalisers_that_decoding_drops(cases: list[dict[str, Any]]) -> None:
    """log π_λ(y) = log q(y) + Σ_t log Z_t − log Z (eq. 7); both sum to one, and they are not the same."""
    for case in cases:
        log_q, sum_log_z = np.array([along(case, sequence) for sequence in case["sequences"]]).T
        np.testing.assert_allclose(log_q + sum_log_z - case["log_partition"], case["sequence_level_logprob"], atol=1e-9)
        assert np.logaddexp.reduce(log_q) == pytest.approx(0.0, abs=1e-9)
        variation = np.abs(np.exp(log_q) - np.exp(case["sequence_level_logprob"])).sum() / 2
        assert variation == pytest.approx(case["total_variation"], abs=1e-9)


def random_logprobs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)


def test_at_a_vertex_the_mixture_is_the_policy() -> None:
    """λ = e_k: q_t = π_k and log Z_t = 0, even where another policy excludes a token."""
    logprobs = random_logprobs(3, 4, 6)
    logprobs[1, :, 2] = -torch.inf
    mixed = mix_logprobs(logprobs, torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(mixed, logprobs[0])
    torch.testing.assert_close(log_normalizer(mixed), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_token_that_one_policy_excludes_is_excluded() -> None:
    """π_k(v) = 0 and λ_k > 0 give q_t(v) = 0."""
    logprobs = random_logprobs(2, 6)
    logprobs[1, 2] = -torch.inf
    assert mix_logprobs(logprobs, torch.tensor([0.9, 0.1]))[2] == -torch.inf


def test_the_normaliser_is_at_most_one() -> None:
    """Hölder: Z_t ≤ 1 for λ ≥ 0 with Σ λ ≥ 1 (design 2.3)."""
    logprobs = random_logprobs(3, 500, 6)
    for weights in ([0.2, 0.3, 0.5], [1.0, 0.5, 0.0], [2.0, 0.0, 0.1]):
        assert (log_normalizer(mix_logprobs(logprobs, torch.tensor(weights))) <= 1e-12).all()


def test_every_request_may_have_its_own_weights() -> None:
    """λ of shape (K, B): row b is mixed with λ[:, b], for logits of one position or of several."""
    weights = torch.rand(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for logprobs in (random_logprobs(3, 5, 6), random_logprobs(3, 5, 2, 6)):
        one_by_one = [mix_logprobs(logprobs[:, b], weights[:, b]) for b in range(5)]
        torch.testing.assert_close(mix_logprobs(logprobs, weights), torch.stack(one_by_one))


def test_mixing_is_the_weighted_sum_of_logprobs() -> None:
    """Σ_k λ_k log π_k(v), λ of any sign."""
    logprobs = random_logprobs(3, 5, 6)
    weights = torch.tensor([0.7, -0.4, 0.7], dtype=torch.float64)
    torch.testing.assert_close(mix_logprobs(logprobs, weights), torch.einsum("kbv,k->bv", logprobs, weights))


def test_one_weight_per_policy_is_required() -> None:
    """K policies, K weights."""
    with pytest.raises(ValueError, match="zip"):
        mix_logprobs(random_logprobs(3, 6), torch.tensor([0.5, 0.5]))
