"""Sequential Monte Carlo over the token-level mixture: its limit is the sequence-level one, its Ẑ has no bias."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from mpo_ray.decoding.batch import Completion, sample_completions
from mpo_ray.decoding.particles import sample_from_particles
from mpo_ray.maths.log_linear import log_normalizer
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.mixture import MixtureForCausalLM
from tests.tiny import tiny_llama, tiny_tokenizer

WEIGHTS = {"warm": 0.6, "brief": 0.4}
WORDS = ("a", "b", "c")
PROMPTS = [[1, 7, 8], [1, 9]]
EOS, LIMIT = 2, 3


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> MixtureForCausalLM:
    """Two random policies over 10 tokens, far from each other: every response of three tokens can be enumerated."""
    root = tmp_path_factory.mktemp("mixture")
    tokenizer = tiny_tokenizer(WORDS)
    policies = {
        name: tiny_llama(root / name, tokenizer, seed, initializer_range=0.6) for seed, name in enumerate(WEIGHTS)
    }
    write_artefact(
        root / "artefact",
        objectives=policies,
        reference=policies["warm"],
        copy_reference=True,
        weights=WEIGHTS,
        fit={},
    )
    return MixtureForCausalLM.from_pretrained(root / "artefact")


def step(model: MixtureForCausalLM, prefixes: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """log q_t (B, V) and log Z_t (B,) after prefixes of one length, by a plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor(prefixes)).logits[:, -1].double()
    return logits - log_normalizer(logits)[:, None], log_normalizer(logits)


def enumerated(model: MixtureForCausalLM, prompt: list[int]) -> tuple[dict[tuple[int, ...], float], float, float]:
    """q(y) Π Z_t of every response, their sum Z, and the total variation between q and π_λ on the first token."""
    size = model.config.vocab_size
    weights: dict[tuple[int, ...], float] = {}
    token_level = np.zeros(size)
    open_ends: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(LIMIT):
        prefixes = list(open_ends)
        log_q, log_z = step(model, [[*prompt, *prefix] for prefix in prefixes])
        if prefixes == [()]:
            token_level = log_q[0].exp().numpy()
        grown = {}
        for row, prefix in enumerate(prefixes):
            for token in range(size):
                total = open_ends[prefix] + float(log_z[row] + log_q[row, token])
                (weights if token == EOS or len(prefix) + 1 == LIMIT else grown)[(*prefix, token)] = total
        open_ends = grown
    z = float(np.exp(list(weights.values())).sum())
    probabilities = {y: float(np.exp(w)) / z for y, w in weights.items()}
    first = np.zeros(size)
    for y, p in probabilities.items():
        first[y[0]] += p
    return probabilities, z, float(np.abs(first - token_level).sum() / 2)


def drawn(model: MixtureForCausalLM, **changes: int) -> list[list[Completion]]:
    settings = {"num_completions": 3000, "num_particles": 32, "max_new_tokens": LIMIT, "seed": 0}
    return sample_from_particles(model, PROMPTS, end_ids=[EOS], pad_id=0, **{**settings, **changes})


def marginal(probabilities: dict[tuple[int, ...], float], place: int, size: int) -> np.ndarray:
    found = np.zeros(size + 1)  # the last entry: the response has ended before
    for y, p in probabilities.items():
        found[y[place] if place < len(y) else size] += p
    return found


def test_many_particles_draw_from_the_sequence_level_mixture_and_one_does_not(mixture: MixtureForCausalLM) -> None:
    """Every token's marginal is within 0.05 of π_λ's (total variation); the first one's of a single particle is not."""
    size = mixture.config.vocab_size
    for prompt, many, single in zip(PROMPTS, drawn(mixture), drawn(mixture, num_particles=1), strict=True):
        probabilities, _, difference = enumerated(mixture, prompt)

        def distance(found: list[Completion], place: int, exact: dict[tuple[int, ...], float] = probabilities) -> float:
            counts = Counter(c.ids[place] if place < len(c.ids) else size for c in found)
            empirical = np.array([counts[v] / len(found) for v in range(size + 1)])
            return float(np.abs(empirical - marginal(exact, place, size)).sum() / 2)

        assert [distance(many, place) for place in range(LIMIT)] == pytest.approx([0.0] * LIMIT, abs=0.05)
        assert distance(single, 0) == pytest.approx(difference, abs=0.05)
        assert difference > 0.15


@pytest.mark.parametrize("num_particles", [2, 8])
def test_the_estimate_of_z_has_no_bias_whatever_the_number_of_particles(
    mixture: MixtureForCausalLM, num_particles: int
) -> None:
    """E Ẑ = Z, within 4 standard errors of 3000 groups, with resampling on the way."""
    for prompt, completions in zip(PROMPTS, drawn(mixture, num_particles=num_particles), strict=True):
        estimates = np.exp([c.log_z_hat for c in completions])
        exact = enumerated(mixture, prompt)[1]
        assert abs(estimates.mean() - exact) < 4 * estimates.std() / np.sqrt(len(estimates))
        assert estimates.std() > 0


def test_the_sum_of_log_z_is_that_of_the_tokens_that_came_out(mixture: MixtureForCausalLM) -> None:
    """Recomputed without a cache: the rows of the cache have moved with the particles when they were resampled."""
    for prompt, completions in zip(PROMPTS, drawn(mixture, num_completions=40, num_particles=8), strict=True):
        for completion in completions:
            prefixes = [[*prompt, *completion.ids[:t]] for t in range(len(completion.ids))]
            total = sum(float(step(mixture, [prefix])[1]) for prefix in prefixes)
            assert completion.log_z == pytest.approx(total, abs=1e-4)


def test_one_particle_is_token_level_decoding(mixture: MixtureForCausalLM) -> None:
    for completions in drawn(mixture, num_completions=50, num_particles=1):
        for completion in completions:
            assert completion.log_z_hat == pytest.approx(completion.log_z)
            assert completion.effective_number == pytest.approx(1.0)


def test_the_seed_decides_and_ends_are_where_they_belong(mixture: MixtureForCausalLM) -> None:
    first = drawn(mixture, num_completions=20, num_particles=4, max_new_tokens=8)
    assert drawn(mixture, num_completions=20, num_particles=4, max_new_tokens=8) == first
    assert drawn(mixture, num_completions=20, num_particles=4, max_new_tokens=8, seed=1) != first
    completions = [c for group in first for c in group]
    assert {c.finished for c in completions} == {True, False}
    for completion in completions:
        assert completion.ids.count(EOS) == completion.finished
        assert completion.ids[-1] == EOS if completion.finished else len(completion.ids) == 8
        assert 1.0 <= (completion.effective_number or 0.0) <= 4.0 + 1e-9


def test_the_mixture_of_batch_decoding_is_the_same_model(mixture: MixtureForCausalLM) -> None:
    """Σ log Z_t of both samplers is measured alike."""
    plain = sample_completions(
        mixture,
        PROMPTS,
        num_completions=30,
        max_new_tokens=LIMIT,
        temperature=1.0,
        end_ids=[EOS],
        pad_id=0,
        seed=3,
    )
    for prompt, completions in zip(PROMPTS, plain, strict=True):
        for completion in completions:
            prefixes = [[*prompt, *completion.ids[:t]] for t in range(len(completion.ids))]
            assert completion.log_z == pytest.approx(sum(float(step(mixture, [p])[1]) for p in prefixes), abs=1e-4)
