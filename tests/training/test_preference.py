"""Preference loss on a real model: the formulas of design 2.1 on separately computed log-probabilities."""

from pathlib import Path

import pytest
import torch

from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.policies.loading import load_model
from mpo_ray.training.preference import Pair, preference_loss
from mpo_ray.training.sft import Example, sft_loss
from tests.tiny import next_logprobs, tiny_llama, tiny_tokenizer

PAIRS = [
    Pair([1, 8, 9], [10, 11, 2], [12, 2], -5.0, -3.0),
    Pair([1, 9], [13, 2], [14, 15, 16, 7, 2], -2.5, -11.0, weight=2.0),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CompletionModel:
    directory: Path = tiny_llama(tmp_path_factory.mktemp("model"), tiny_tokenizer(), seed=0)
    return CompletionModel(load_model(str(directory)))


def _logprob(model: CompletionModel, prompt: list[int], completion: list[int]) -> float:
    """Σ_t log π(y_t | x, y_<t), one token at a time."""
    ids = [*prompt, *completion]
    return sum(float(next_logprobs(model.causal_lm, ids[:t])[ids[t]]) for t in range(len(prompt), len(ids)))


def _margin(model: CompletionModel, pair: Pair, normalized: bool = False) -> float:
    sides = ((pair.chosen_ids, pair.log_ref_chosen), (pair.rejected_ids, pair.log_ref_rejected))
    ratios = [
        (_logprob(model, list(pair.prompt_ids), list(ids)) - ref) / (len(ids) if normalized else 1)
        for ids, ref in sides
    ]
    return ratios[0] - ratios[1]


def _losses(model: CompletionModel, **changes: object) -> torch.Tensor:
    settings = {"loss": "dpo", "beta": 0.3, "length_normalized": False, "pad_id": 0, "device": "cpu"}
    return preference_loss(model, PAIRS, **{**settings, **changes}).losses.detach().double()


def test_dpo_is_minus_log_sigmoid_of_beta_h_times_the_weight(model: CompletionModel) -> None:
    expected = [-p.weight * float(torch.nn.functional.logsigmoid(torch.tensor(0.3 * _margin(model, p)))) for p in PAIRS]
    assert _losses(model).tolist() == pytest.approx(expected, rel=1e-4)


def test_ipo_is_the_square_of_h_minus_half_over_beta(model: CompletionModel) -> None:
    expected = [p.weight * (_margin(model, p) - 1 / (2 * 0.3)) ** 2 for p in PAIRS]
    assert _losses(model, loss="ipo").tolist() == pytest.approx(expected, rel=1e-4)


def test_length_normalisation_divides_policy_and_reference_by_the_completions_length(model: CompletionModel) -> None:
    expected = [p.weight * (_margin(model, p, normalized=True) - 1 / (2 * 0.3)) ** 2 for p in PAIRS]
    assert _losses(model, loss="ipo", length_normalized=True).tolist() == pytest.approx(expected, rel=1e-4)


def test_statistics_are_sums_over_pairs(model: CompletionModel) -> None:
    result = preference_loss(model, PAIRS, loss="dpo", beta=0.3, length_normalized=False, pad_id=0, device="cpu")
    margins = [0.3 * _margin(model, p) for p in PAIRS]
    loss, accuracy, margin, count = result.statistics().tolist()
    assert loss == pytest.approx(float(result.losses.detach().sum()), rel=1e-5)
    assert accuracy == sum(m > 0 for m in margins)
    assert margin == pytest.approx(sum(margins), rel=1e-4)
    assert count == 2


def test_sft_is_the_negative_log_likelihood_of_completions_and_their_tokens(model: CompletionModel) -> None:
    examples = [Example([1, 8], [9, 10, 2]), Example([1], [12, 2])]
    total, num_tokens = sft_loss(model, examples, pad_id=0, device="cpu")
    expected = -sum(_logprob(model, list(e.prompt_ids), list(e.response_ids)) for e in examples)
    assert float(total.detach()) == pytest.approx(expected, rel=1e-4)
    assert num_tokens == 5
