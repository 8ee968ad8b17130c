"""Batch sampling: from the model's own distribution, reproducibly, with ends where they belong."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from mpo_ray.decoding import batch
from mpo_ray.decoding.batch import draw_tokens, sample_completions
from mpo_ray.policies.loading import load_model
from tests.tiny import next_logprobs, tiny_llama, tiny_tokenizer

PROMPTS = [[1, 8, 9, 10], [1, 12]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    directory: Path = tiny_llama(tmp_path_factory.mktemp("model"), tiny_tokenizer(), seed=5)
    return load_model(str(directory))


def _sample(model: PreTrainedModel, **changes: object) -> list:
    settings = {"num_completions": 1, "max_new_tokens": 6, "temperature": 1.0, "end_ids": [2], "pad_id": 0, "seed": 0}
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


def test_rows_that_ended_may_leave_the_batch_at_any_time(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a row draws depends on its own random numbers alone: dropped at once, now and then, or never."""
    drawn = []
    for share in (1e-9, batch.DROPPED_SHARE, 2.0):
        monkeypatch.setattr(batch, "DROPPED_SHARE", share)
        drawn.append(_sample(model, num_completions=40, max_new_tokens=20))
    assert drawn[0] == drawn[1] == drawn[2]
    assert len({len(completion.ids) for group in drawn[0] for completion in group}) > 8


def test_rows_leave_the_batch_once_enough_have_ended(model: PreTrainedModel) -> None:
    """No step runs more rows than had not ended, but for the tolerated share of its batch."""
    rows: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda layer, inputs, out: rows.append(len(out)))
    drawn = _sample(model, num_completions=40, max_new_tokens=20)
    hook.remove()
    lengths = [len(completion.ids) for group in drawn for completion in group]
    assert rows[0] == len(PROMPTS)  # a prompt is computed once for all its completions
    for step, num_rows in enumerate(rows[1:], start=1):
        unfinished = sum(length > step for length in lengths)
        assert unfinished >= (1 - batch.DROPPED_SHARE) * num_rows - 1


def test_a_lower_limit_cuts_the_same_completions_earlier(model: PreTrainedModel) -> None:
    long = [c.ids for group in _sample(model, num_completions=10, max_new_tokens=12) for c in group]
    short = [c.ids for group in _sample(model, num_completions=10, max_new_tokens=5) for c in group]
    assert short == [ids[:5] for ids in long]


def test_draws_invert_the_cumulative_distribution() -> None:
    """v is drawn for u in [P(<v), P(≤v)), so with probability π(v); what has probability 0 never is."""
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.125, 0.375, 0.0])
    uniforms = torch.tensor([0.0, 0.499, 0.5, 0.624, 0.625, batch.LARGEST_UNIFORM], dtype=torch.float64)
    logits = probabilities.log().expand(6, -1)
    assert draw_tokens(logits, uniforms, temperature=1.0).tolist() == [1, 1, 3, 3, 4, 4]
    assert draw_tokens(logits, uniforms, temperature=0.0).tolist() == [1] * 6
    half = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    counts = draw_tokens(probabilities.log().expand(4000, -1), half, temperature=0.5).bincount(minlength=6)
    squares = probabilities**2 / (probabilities**2).sum()
    torch.testing.assert_close(counts / 4000, squares, atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_tokens", [129, 300, 1024])
def test_draws_invert_it_across_many_tokens(num_tokens: int) -> None:
    """Where tokens are looked up in two steps: P(<v) ≤ u < P(≤v) to rounding, at both ends too, and π(v) > 0."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_tokens, generator=generator)
    logits[torch.rand(num_tokens, generator=generator) < 0.5] = float("-inf")
    logits[batch.CHUNK - 3 : batch.CHUNK + 3] = float("-inf")
    probabilities = logits.double().softmax(-1)
    upper = probabilities.cumsum(-1)
    uniforms = torch.linspace(0, 1, 2000, dtype=torch.float64).clamp(max=batch.LARGEST_UNIFORM)
    drawn = draw_tokens(logits.expand(2000, -1), uniforms, temperature=1.0)
    assert (probabilities[drawn] > 0).all()
    assert (uniforms <= upper[drawn] + 1e-6).all()
    assert (uniforms >= upper[drawn] - probabilities[drawn] - 1e-6).all()


def test_each_end_token_ends_a_completion(model: PreTrainedModel) -> None:
    """What came before it is what is drawn without it; the first of them is the last id."""
    whole = _sample(model, max_new_tokens=12, end_ids=[2])
    common = whole[0][0].ids[3]
    ended = _sample(model, max_new_tokens=12, end_ids=[2, common])
    for before, after in zip(whole, ended, strict=True):
        ids = before[0].ids
        place = next((n for n, id in enumerate(ids) if id in (2, common)), None)
        assert after[0].ids == (ids if place is None else ids[: place + 1])
        assert after[0].finished == (place is not None)
    assert ended[0][0].finished
    assert len(ended[0][0].ids) <= 4
