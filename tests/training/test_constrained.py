"""MOPO's policy step on a real model: the loss, ρ on shifted shares, and statistics (design 2.4)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mpo_ray.maths.constrained import ratio
from mpo_ray.maths.partition import effective_sample_size
from mpo_ray.maths.robust import robust_bound
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.policies.loading import load_model
from mpo_ray.training.constrained import (
    Candidates,
    Problem,
    Statistics,
    cloning_loss,
    pool_of,
    statistics,
    token_batch,
)
from tests.tiny import next_logprobs, tiny_llama, tiny_tokenizer
from tests.training.candidates import PROBLEM, as_row, candidates

BATCH = candidates(3, seed=0)
LAMBDA = np.array([0.7, 0.2])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CompletionModel:
    directory: Path = tiny_llama(tmp_path_factory.mktemp("model"), tiny_tokenizer(), seed=0)
    return CompletionModel(load_model(str(directory)))


def _logprobs(model: CompletionModel, given: Candidates) -> np.ndarray:
    """(m,) Σ_t log π(y_t | x, y_<t), one token at a time."""
    prompt = list(given.prompt_ids)
    rows = [[*prompt, *ids] for ids in given.response_ids]
    return np.array(
        [
            sum(float(next_logprobs(model.causal_lm, row[:t])[row[t]]) for t in range(len(prompt), len(row)))
            for row in rows
        ]
    )


def test_the_loss_is_the_mean_over_prompts_of_the_sum_over_candidates(model: CompletionModel) -> None:
    """−E_x Σ_y π_ref(y) ρ(y) log π_ψ(y|x), ρ = exp((p̄ + λᵀq̄)/τ) / E_ref[…], all written out."""
    pool = pool_of(BATCH)
    loss = cloning_loss(model(token_batch(BATCH, pad_id=0)), pool, ratio(pool, LAMBDA, PROBLEM.tau))
    expected = 0.0
    for given in BATCH:
        tilts = np.exp((given.primary + given.secondary @ LAMBDA) / PROBLEM.tau)
        shares = np.exp(given.log_reference)
        for y, logprob in enumerate(_logprobs(model, given)):
            expected -= shares[y] * tilts[y] / (shares @ tilts) * logprob / len(BATCH)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_no_gradient_passes_through_a_ratio_that_the_policy_itself_gave(model: CompletionModel) -> None:
    """With π_ref = π_ψ, ∂loss/∂log π_ψ(y) is −π_ref(y) ρ(y)/P, as if the weights were any other numbers."""
    logprobs = torch.tensor(np.concatenate([_logprobs(model, c) for c in BATCH]), requires_grad=True)
    pool = pool_of(BATCH, logprobs.detach().numpy() - 3.0)
    rho = ratio(pool, LAMBDA, PROBLEM.tau)
    cloning_loss(logprobs, pool, rho).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.numpy() == pytest.approx(-np.exp(pool.log_reference) * rho / len(BATCH), rel=1e-9)


def test_another_reference_shares_a_prompts_candidates_by_its_log_ratio() -> None:
    """π(y) ∝ π_ref(y) exp(log-ratio) within the candidates, and any constant per prompt cancels."""
    log_ratios = np.random.default_rng(1).normal(size=len(pool_of(BATCH).primary))
    pool = pool_of(BATCH, log_ratios)
    for number, given in enumerate(BATCH):
        rows = slice(pool.starts[number], pool.starts[number + 1])
        products = np.exp(given.log_reference) * np.exp(log_ratios[rows])
        assert np.exp(pool.log_reference[rows]) == pytest.approx(products / products.sum())
    assert pool_of(BATCH, log_ratios - 40.0).log_reference == pytest.approx(pool.log_reference)


def test_statistics_are_means_over_prompts_of_expectations_within_them() -> None:
    first, pool = pool_of(BATCH), pool_of(BATCH, np.linspace(-1, 1, len(pool_of(BATCH).primary)))
    rho, log_chi = ratio(pool, LAMBDA, PROBLEM.tau), np.array([0.3, -0.5])
    found = statistics(pool, rho, first, log_chi)
    weights = np.exp(pool.log_reference) * rho
    parts = [slice(a, b) for a, b in zip(pool.starts, pool.starts[1:], strict=False)]
    assert found.primary == pytest.approx(np.mean([weights[p] @ pool.primary[p] for p in parts]))
    assert found.values == pytest.approx(np.mean([weights[p] @ pool.secondary[p] for p in parts], axis=0))
    assert found.kl == pytest.approx(
        np.mean([weights[p] @ (np.log(weights[p]) - first.log_reference[p]) for p in parts])
    )
    tilted = effective_sample_size(pool.tilted(PROBLEM.tau), np.array([1.0, *LAMBDA]))
    assert found.effective_share == pytest.approx(np.mean(tilted / np.diff(pool.starts)))
    scaled = rho * pool.secondary[:, 1] / np.exp(-0.5)
    assert found.moments[1, 1] == pytest.approx(
        np.mean([np.exp(pool.log_reference[p]) @ (scaled[p] * np.exp(-scaled[p])) for p in parts])
    )


def test_statistics_of_equal_parts_average_to_those_of_the_whole() -> None:
    """What lets workers and forward passes be averaged, the robust bound's moments included."""

    def of(batch: list[Candidates]) -> np.ndarray:
        pool = pool_of(batch)
        return statistics(pool, ratio(pool, LAMBDA, PROBLEM.tau), pool, np.zeros(2)).as_array()

    batch = candidates(6, seed=3)
    assert np.mean([of(batch[:3]), of(batch[3:])], axis=0) == pytest.approx(of(batch), rel=1e-12)
    again = Statistics.of_array(of(batch))
    assert again.as_array().tolist() == of(batch).tolist()
    pool = pool_of(batch)
    rho = ratio(pool, LAMBDA, PROBLEM.tau)
    exact = robust_bound(pool.joint_log_reference, rho * pool.secondary[:, 0], 0.01)
    found = statistics(pool, rho, pool, np.full(2, np.log(exact.chi)))
    assert -exact.chi * (np.log(found.moments[0, 0]) + 0.01) == pytest.approx(exact.value, rel=1e-9)


def test_a_row_comes_back_as_it_was_written() -> None:
    row = as_row(0, BATCH[0])
    found = Candidates.of_row(row, num_secondary=2)
    assert as_row(0, found) == row
    assert found.num_tokens == 2 + max(len(ids) for ids in BATCH[0].response_ids)


@pytest.mark.parametrize(
    ("column", "scale", "message"), [("ratio", 2.0, "ρ has mean 2.0000"), ("log_reference", 2.0, "sum to 0")]
)
def test_a_row_whose_ratio_or_shares_are_not_normalised_is_refused(column: str, scale: float, message: str) -> None:
    """The paper's Eq. 3 is unnormalised: ρ must average to 1 under π_ref for each prompt (trap 1)."""
    row = as_row(0, BATCH[0])
    row[column] = [scale * value for value in row[column]]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=f"prompt p0.*{message}"):
        Candidates.of_row(row, num_secondary=2)


def test_a_problem_has_one_bound_per_secondary_objective() -> None:
    with pytest.raises(ValueError, match="2 secondary objectives have 1 bounds"):
        Problem.model_validate({**PROBLEM.model_dump(), "bounds": [0.5]})
