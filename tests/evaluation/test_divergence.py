"""KL and log Z along completions, against plain forward passes token by token."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_ray.evaluation.candidate_models import CandidateModels
from mpo_ray.evaluation.candidates import Candidate
from mpo_ray.evaluation.divergence import divergences, tilts
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.policies.loading import load_model, load_policy
from mpo_ray.policies.soup import load_soup
from tests.tiny import next_logprobs, tiny_llama, tiny_lora, tiny_tokenizer

SEQUENCES = [([1, 8, 9], [10, 11, 2]), ([1], [12, 2]), ([1, 9, 8, 7], [13, 14, 15, 7, 2]), ([1, 12], [2])]
WEIGHTS = {"lora": 0.5, "whole": 0.3, "second": 0.2}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A reference, policies of both kinds, their mixture's artefact, and a model of somebody else's."""
    root: Path = tmp_path_factory.mktemp("candidates")
    tokenizer = tiny_tokenizer()
    base = tiny_llama(root / "base", tokenizer, seed=0)
    policies = {
        "lora": tiny_lora(root / "lora", base, seed=1),
        "whole": tiny_llama(root / "whole", tokenizer, seed=2),
        "second": tiny_lora(root / "second", base, seed=3),
    }
    write_artefact(root / "mixture", objectives=policies, reference=base, copy_reference=False, weights=WEIGHTS, fit={})
    other = tiny_llama(root / "other", tokenizer, seed=4)
    found = {"reference": base, **policies, "mixture": root / "mixture", "other": other}
    return {name: str(path) for name, path in found.items()}


@pytest.fixture(scope="module")
def models(places: dict[str, str]) -> CandidateModels:
    policies = {name: places[name] for name in WEIGHTS}
    ensemble = Ensemble(places["reference"], policies)
    return CandidateModels(ensemble, places["reference"], policies)


def measured(models: CandidateModels, candidate: Candidate, batch_size: int = 3) -> tuple[list[float], list[float]]:
    with models._ensemble.model("reference") as reference, models.open(candidate) as model:
        return divergences(model, reference, SEQUENCES, batch_size=batch_size, pad_id=0)


def prefixes(prompt: list[int], completion: list[int]) -> list[list[int]]:
    return [[*prompt, *completion[:t]] for t in range(len(completion))]


def test_a_mixtures_kl_and_log_z_are_sums_over_the_completions_tokens(places, models) -> None:
    """log Z_t = log Σ_v Π_k π_k(v)^λ_k and KL_t = Σ_v q_t (log q_t − log π_ref,t), prefix by prefix."""
    policies = {name: load_policy(places[name], places["reference"]) for name in WEIGHTS}
    reference = load_model(places["reference"])
    kl, log_z = measured(models, Candidate("mixture", tuple(WEIGHTS.values())))
    for i, (prompt, completion) in enumerate(SEQUENCES):
        distance = dropped = 0.0
        for prefix in prefixes(prompt, completion):
            mixed = sum(weight * next_logprobs(policies[name], prefix) for name, weight in WEIGHTS.items())
            normalizer = mixed.logsumexp(-1)
            log_q = mixed - normalizer
            distance += float((log_q.exp() * (log_q - next_logprobs(reference, prefix))).sum())
            dropped += float(normalizer)
        assert kl[i] == pytest.approx(distance, abs=1e-3)
        assert log_z[i] == pytest.approx(dropped, abs=1e-3)
        assert log_z[i] < -0.01  # Hölder, and the policies differ


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_tilt_is_the_mixtures_log_ratio_without_its_normaliser(places, models, batch_size: int) -> None:
    """Σ_t [Σ_k λ_k log π_k(y_t) − log π_ref(y_t)], prefix by prefix."""
    policies = {name: load_policy(places[name], places["reference"]) for name in WEIGHTS}
    reference = load_model(places["reference"])
    mixed = Candidate("mixture", tuple(WEIGHTS.values()))
    with models._ensemble.model("reference") as base, models.open(mixed) as mixture:
        found = tilts(mixture, base, SEQUENCES, batch_size=batch_size, pad_id=0)
    for tilt, (prompt, completion) in zip(found, SEQUENCES, strict=True):
        expected = 0.0
        for prefix, token in zip(prefixes(prompt, completion), completion, strict=True):
            expected += sum(w * float(next_logprobs(policies[name], prefix)[token]) for name, w in WEIGHTS.items())
            expected -= float(next_logprobs(reference, prefix)[token])
        assert tilt == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", ["soup", "model"])
def test_a_plain_models_kl_is_the_sum_over_the_completions_tokens(places, models, kind: str) -> None:
    """Soups and other people's models: no log Z."""
    if kind == "soup":
        candidate = Candidate("soup", tuple(WEIGHTS.values()))
        alone = load_soup(places["reference"], {name: places[name] for name in WEIGHTS}, WEIGHTS)
    else:
        candidate, alone = Candidate("model", path=places["other"]), load_model(places["other"])
    reference = load_model(places["reference"])
    kl, log_z = measured(models, candidate)
    for found, (prompt, completion) in zip(kl, SEQUENCES, strict=True):
        pairs = [(next_logprobs(alone, p), next_logprobs(reference, p)) for p in prefixes(prompt, completion)]
        expected = sum(float((log_q.exp() * (log_q - log_ref)).sum()) for log_q, log_ref in pairs)
        assert found == pytest.approx(expected, abs=1e-3)
    assert log_z == [0.0] * 4


def test_the_batch_does_not_matter(models) -> None:
    candidate = Candidate("mixture", tuple(WEIGHTS.values()))
    for one, many in zip(measured(models, candidate, 1), measured(models, candidate, 4), strict=True):
        assert one == pytest.approx(many, abs=1e-4)


def test_at_a_vertex_nothing_is_dropped(models) -> None:
    _, log_z = measured(models, Candidate("mixture", (0.0, 1.0, 0.0)))
    assert log_z == pytest.approx([0.0] * 4, abs=1e-5)


def test_models_are_opened_once_and_one_soup_at_a_time(models) -> None:
    """The reference and the mixture stay; the same soup asked for twice is the same object, another one replaces it."""

    def opened(candidate: Candidate) -> Any:
        with models.open(candidate) as model:
            return model

    soup = Candidate("soup", (0.5, 0.25, 0.25))
    first = opened(soup)
    assert opened(Candidate("reference")) is models._ensemble.stack.base
    mixture = opened(Candidate("mixture", (1.0, 0.0, 0.0)))
    assert mixture is opened(Candidate("mixture", (0.0, 0.5, 0.5)))
    assert mixture.config.weights == {"lora": 0.0, "whole": 0.5, "second": 0.5}
    held = {one.data_ptr() for one in mixture.parameters()} | {
        one.data_ptr() for one in models._ensemble.stack.parameters()
    }
    assert len(held) == len({one.data_ptr() for one in mixture.parameters()}), "the reference is held a second time"
    assert opened(soup) is first
    opened(Candidate("soup", (0.2, 0.4, 0.4)))
    assert opened(soup) is not first
    ids = torch.tensor([[1, 8, 9, 10]])
    assert torch.equal(opened(soup)(ids).logits, first(ids).logits)
