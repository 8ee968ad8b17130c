"""Log-probabilities of completions and the divergence along them, on worlds that can be enumerated."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpo_ray.maths.sequence_logprob import prediction_mask, sequence_kl, sequence_logprob, token_logprobs
from tests.world import World, model_batch, random_table, sequence_logprobs


def _logprobs(logits: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor, **how: bool) -> torch.Tensor:
    """`sequence_logprob` from the whole batch's logits, of which it is given the predictions."""
    return sequence_logprob(logits[prediction_mask(mask)], input_ids, mask, **how)


@pytest.fixture(scope="module")
def world() -> World:
    return World.random(0, num_tokens=4)


def test_the_completion_has_the_probability_that_the_chain_rule_gives(world: World) -> None:
    """log π(y|x) = Σ_t log π(y_t | y_<t), end token included, prompt and padding left out."""
    for k, table in enumerate(world.policies):
        found = _logprobs(*model_batch(world, table))
        np.testing.assert_allclose(found.numpy(), world.log_policies[:, k], atol=1e-4)


def test_all_responses_together_have_probability_one(world: World) -> None:
    """Σ_y π(y|x) = 1 over every response of the world."""
    found = _logprobs(*model_batch(world, world.policies[0]))
    assert found.double().logsumexp(0).item() == pytest.approx(0.0, abs=1e-5)


def test_length_normalised_is_the_mean_over_the_completions_tokens(world: World) -> None:
    """(1/|y|) Σ_t log π(y_t | y_<t), |y| counting the end token."""
    batch = model_batch(world, world.policies[0])
    lengths = torch.tensor([len(response) for response in world.responses])
    normalized = _logprobs(*batch, length_normalized=True)
    torch.testing.assert_close(normalized * lengths, _logprobs(*batch))


def test_an_empty_completion_has_logprob_zero(world: World) -> None:
    """An empty sum, with no division by zero in the mean."""
    logits, input_ids, mask = model_batch(world, world.policies[0])
    empty = torch.zeros_like(mask)
    assert _logprobs(logits, input_ids, empty, length_normalized=True).tolist() == [0.0] * len(mask)


@pytest.mark.parametrize("most_at_once", [2**24, 15])  # all rows together; two at a time
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_the_gradient_is_the_token_less_its_probability(
    dtype: torch.dtype, tolerance: float, most_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """∂ log π(y_t) / ∂ logit(v) = [v = y_t] − π(v): what automatic differentiation of log_softmax gives."""
    monkeypatch.setattr("mpo_ray.maths.sequence_logprob.MOST_LOGITS_AT_ONCE", most_at_once)
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(9, 7, generator=generator)).to(dtype).requires_grad_()
    token_ids = torch.randint(7, (9,), generator=generator)
    upstream = torch.randn(9, generator=generator)

    expected = logits.float().log_softmax(-1).gather(-1, token_ids[:, None]).squeeze(-1)
    (expected_gradient,) = torch.autograd.grad(expected, logits, upstream)
    found = token_logprobs(logits, token_ids)
    (gradient,) = torch.autograd.grad(found, logits, upstream)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, atol=tolerance, rtol=tolerance)


def test_only_the_positions_that_predict_the_completion_receive_gradient(world: World) -> None:
    """Position t predicts token t + 1: ∂ log π(y|x) / ∂ logits is zero after the last token's prediction."""
    logits, input_ids, mask = model_batch(world, world.policies[0])
    logits.requires_grad_()
    _logprobs(logits, input_ids, mask).sum().backward()
    assert logits.grad is not None
    used = logits.grad.abs().sum(-1) > 0
    assert torch.equal(used, prediction_mask(mask))
    assert torch.equal(used[:, :-1], mask[:, 1:])


def test_the_divergence_along_sequences_averages_to_the_divergence_between_them(world: World) -> None:
    """E_{y∼q} Σ_t KL(q_t ‖ π_ref,t) = KL(q ‖ π_ref) = Σ_y q(y) log(q(y)/π_ref(y)): the chain rule of KL."""
    policy = world.policies[0]
    reference = random_table(world.num_tokens, world.max_tokens, spread=1.5, rng=np.random.default_rng(5))
    logits, _, mask = model_batch(world, policy)
    places = prediction_mask(mask)
    along = sequence_kl(logits[places], model_batch(world, reference)[0][places], mask).double().numpy()

    log_q = world.log_policies[:, 0]
    exact = np.sum(np.exp(log_q) * (log_q - sequence_logprobs(reference, world.responses)))
    assert exact > 0.5
    assert np.exp(log_q) @ along == pytest.approx(exact, abs=1e-5)
    assert (along >= 0).all()


def test_a_token_that_q_excludes_adds_nothing_to_the_divergence() -> None:
    """0 log 0 = 0: with q on one of two equally likely tokens, KL(q_t ‖ π_ref,t) = log 2."""
    excluded = torch.tensor([[0.0, -torch.inf]])
    even = torch.zeros(1, 2)
    mask = torch.tensor([[False, True]])
    assert sequence_kl(excluded, even, mask).item() == pytest.approx(np.log(2))
    assert sequence_kl(even, excluded, mask).item() == np.inf
