"""Batch sampling: from the model's own distribution, reproducibly, with ends where they belong."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from mpo_ray.decoding.batch import sample_completions
from mpo_ray.policies.loading import load_model
from tests.tiny import next_logprobs, tiny_llama, tiny_tokenizer

PROMPTS = [[1, 8, 9, 10], [1, 12]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    directory: Path = tiny_llama(tmp_path_factory.mktemp("model"), tiny_tokenizer(), seed=5)
    return load_model(str(directory))


def _sample(model: PreTrainedModel, **changes: object) -> list:
    settings = {"num_completions": 1, "max_new_tokens": 6, "temperature": 1.0, "eos_id": 2, "pad_id": 0, "seed": 0}
    return sample_completions(model, PROMPTS, **{**settings, **changes})


def test_first_tokens_follow_the_models_distribution_in_a_padded_batch(model: PreTrainedModel) -> None:
    """4000 draws: total variation distance from π(· | x) stays below what chance gives at 25 tokens."""
    drawn = _sample(model, num_completions=4000, max_new_tokens=1)
    for prompt, completions in zip(PROMPTS, drawn, strict=True):
        counts = Counter(c.ids[0] for c in completions)
        exact = next_logprobs(model, prompt).exp()
        assert sum(abs(counts[v] / 4000 - float(exact[v])) for v in range(len(exact))) / 2 < 0.04


def test_temperature_zero_is_greedy(model: PreTrainedModel) -> None:
    for prompt, [completion] in zip(PROMPTS, _sample(model, temperature=0.0), strict=True):
        ids = list(prompt)
        for token in completion.ids:
            assert token == int(next_logprobs(model, ids).argmax())
            ids.append(token)


def test_the_seed_decides_and_the_global_generator_does_not(model: PreTrainedModel) -> None:
    first = _sample(model, num_completions=8)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert _sample(model, num_completions=8) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert _sample(model, num_completions=8, seed=1) != first


def test_a_completion_ends_with_its_first_end_token_or_at_the_limit(model: PreTrainedModel) -> None:
    completions = [c for group in _sample(model, num_completions=64, max_new_tokens=12) for c in group]
    assert {c.finished for c in completions} == {True, False}
    for completion in completions:
        assert completion.ids.count(2) == completion.finished
        assert completion.ids[-1] == 2 if completion.finished else len(completion.ids) == 12
