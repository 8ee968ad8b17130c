"""Drawing one sequence as a stream: the same tokens as `generate`, the right distribution, and a way to stop."""

from __future__ import annotations

import pytest
import torch

from mpo_ray.decoding.sampling import draw_token, nucleus, stream_tokens
from mpo_ray.policies.loading import load_model
from tests.tiny import next_logprobs, tiny_llama, tiny_tokenizer

PROMPT = [1, 7, 9, 10]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return load_model(str(tiny_llama(tmp_path_factory.mktemp("model"), tiny_tokenizer(), seed=0)))


def stream(model, *, eos_ids=(), **changes) -> list[int]:
    values = {"max_new_tokens": 20, "temperature": 0.0, "top_p": 1.0, "generator": torch.Generator().manual_seed(0)}
    return list(stream_tokens(model, PROMPT, eos_ids=eos_ids, **{**values, **changes}))


def test_temperature_zero_is_greedy_generation(model) -> None:
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 4:]
    assert stream(model) == expected.tolist()


def test_the_end_token_comes_last(model) -> None:
    tokens = stream(model)
    end = tokens[5]
    assert stream(model, eos_ids=[end]) == tokens[: tokens.index(end) + 1]


def test_first_tokens_follow_the_models_distribution(model) -> None:
    """χ² of 3000 draws at temperature 0.7 against softmax(log π / 0.7), within five standard deviations."""
    generator = torch.Generator().manual_seed(0)
    draws = 3000
    expected = draws * torch.softmax(next_logprobs(model, PROMPT) / 0.7, -1)
    logits = model(torch.tensor([PROMPT])).logits[0, -1].detach()
    tokens = [draw_token(logits, temperature=0.7, top_p=1.0, generator=generator) for _ in range(draws)]
    counts = torch.bincount(torch.tensor(tokens), minlength=len(expected)).double()
    likely = expected > 5
    freedom = int(likely.sum()) - 1
    assert freedom >= 3
    assert ((counts - expected) ** 2 / expected)[likely].sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_the_seed_decides_the_sample(model) -> None:
    def drawn(seed: int) -> list[int]:
        return stream(model, temperature=1.0, generator=torch.Generator().manual_seed(seed))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    p = torch.tensor([0.1, 0.5, 0.05, 0.35])
    assert (nucleus(p, 0.5) > 0).tolist() == [False, True, False, False]
    assert (nucleus(p, 0.51) > 0).tolist() == [False, True, False, True]
    assert (nucleus(p, 0.9) > 0).tolist() == [True, True, False, True]
    assert (nucleus(p, 1e-9) > 0).sum() == 1


def test_nothing_is_decoded_ahead(model) -> None:
    """Three tokens cost three forward passes; dropping the iterator is all it takes to stop."""
    calls: list[torch.nn.Module] = []
    hook = model.register_forward_pre_hook(lambda module, _: calls.append(module))
    tokens = stream_tokens(
        model, PROMPT, max_new_tokens=20, temperature=0.0, top_p=1.0, eos_ids=[], generator=torch.Generator()
    )
    assert [next(tokens) for _ in range(3)] == stream(model, max_new_tokens=3)
    hook.remove()
    assert len(calls) == 6
