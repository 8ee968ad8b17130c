"""vLLM as a run's sampler: it draws from the models' own distributions, and a seed gives the same again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpo_ray.decoding.offline import Completion
from mpo_ray.decoding.protocol import RequestError
from mpo_ray.decoding.sampler import Room, sampling_recipe
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.policies.loading import ModelError
from mpo_ray.policies.memory import GIB
from mpo_ray.policies.mixture import mixture_of
from mpo_ray.records import REFERENCE
from mpo_ray.run import StageError
from mpo_ray.vllm_plugin.offline import memory_arguments
from tests.decoding.mixtures import Response, p_value
from tests.vllm_plugin.mixtures import MARKS, NAMES, WEIGHTS
from tests.vllm_plugin.test_scoring import world

pytestmark = MARKS
PROMPTS, LIMIT, PASSES = [[1, 7, 8], [1, 12]], 2, 1e-4
#: Half of the tokens end a response, so that some are shorter than others.
ENDS = (2, *range(4, 15))
#: The reference, a policy that is an adapter, one with full weights, and the mixture.
DRAWN: dict[str, dict[str, float]] = {
    "reference": {REFERENCE: 1.0},
    "adapter": {"helpful": 1.0, "harmless": 0.0, "2": 0.0},
    "full": {"harmless": 1.0},
    "mixture": WEIGHTS,
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """Two adapters of different ranks and a policy with full weights."""
    return world(tmp_path_factory.mktemp("sampler"), "afa")


@pytest.fixture(scope="module")
def sampler(places: tuple[str, dict[str, str]]) -> Iterator[Any]:
    from mpo_ray.vllm_plugin.sampler import VllmSampler

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        sampler = VllmSampler(*places, room=Room(64))
        yield sampler
        sampler.close()


@pytest.fixture(scope="module")
def exact(places: tuple[str, dict[str, str]]) -> dict[str, list[dict[Response, float]]]:
    """log probability of every response to each prompt, by plain forward passes over the models."""
    ensemble = Ensemble(*places)
    found: dict[str, list[dict[Response, float]]] = {}
    for name in (REFERENCE, *NAMES):
        with ensemble.model(name) as model:
            found[name] = [responses_of(model, prompt) for prompt in PROMPTS]
    mixture = mixture_of(ensemble)
    mixture.set_weights(WEIGHTS)
    mixed = [responses_of(mixture, prompt) for prompt in PROMPTS]
    return {"reference": found[REFERENCE], "adapter": found["helpful"], "full": found["harmless"], "mixture": mixed}


def responses_of(model: Any, prompt: list[int]) -> dict[Response, float]:
    def after(prefix: Response) -> list[float]:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *prefix]])).logits[0, -1]
        values: list[float] = logits.double().log_softmax(-1).tolist()
        return values

    logprobs: dict[Response, float] = {}
    for token, logprob in enumerate(after(())):
        if token in ENDS:
            logprobs[token,] = logprob
        else:
            logprobs |= {(token, other): logprob + further for other, further in enumerate(after((token,)))}
    return logprobs


def draw(sampler: Any, weights: Mapping[str, float], num: int = 1, seed: int = 0, **how: Any) -> list[list[Completion]]:
    asked = {"max_new_tokens": LIMIT, "temperature": 1.0, **how}
    ends = asked.pop("ends", ENDS)
    drawn: list[list[Completion]] = sampler.draw(
        PROMPTS, sampling_recipe(weights, **asked), num=num, end_ids=ends, seed=seed
    )
    return drawn


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_drawn_is_of_its_own_distribution_and_of_no_other(
    sampler: Any, exact: dict[str, list[dict[Response, float]]], name: str
) -> None:
    """χ² of 3000 responses to each of two prompts."""
    drawn = draw(sampler, DRAWN[name], num=3000)
    for number, completions in enumerate(drawn):
        found = [completion.tokens for completion in completions]
        assert p_value(found, exact[name][number]) > PASSES
        for other in exact.keys() - {name}:
            assert p_value(found, exact[other][number]) < PASSES
        for completion in completions:
            assert completion.ended == (completion.tokens[-1] in ENDS)


def test_temperature_zero_gives_the_tokens_of_the_projects_own_engine(
    sampler: Any, places: tuple[str, dict[str, str]]
) -> None:
    from mpo_ray.decoding.sampler import EnsembleSampler

    own = EnsembleSampler(Ensemble(*places), Room(4))
    how: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 20, "ends": (2,)}
    for weights in DRAWN.values():
        expected, found = draw(own, weights, **how), draw(sampler, weights, **how)
        assert [[c.tokens for c in row] for row in found] == [[c.tokens for c in row] for row in expected]


def test_a_seed_gives_the_same_again_whatever_was_drawn_in_between(sampler: Any) -> None:
    """Also of a prompt and number alone, and not of another seed. Another model is opened in between."""
    first = draw(sampler, WEIGHTS, num=20, seed=3, max_new_tokens=12)
    draw(sampler, {REFERENCE: 1.0}, num=5, seed=3)
    assert draw(sampler, WEIGHTS, num=20, seed=3, max_new_tokens=12) == first
    assert [row[:4] for row in first] == draw(sampler, WEIGHTS, num=4, seed=3, max_new_tokens=12)
    assert draw(sampler, WEIGHTS, num=20, seed=4, max_new_tokens=12) != first
    assert len({completion.tokens for completion in first[0]}) > 15


def test_what_cannot_be_drawn_is_refused(sampler: Any, places: tuple[str, dict[str, str]]) -> None:
    from mpo_ray.vllm_plugin.sampler import VllmSampler

    with pytest.raises(RequestError, match="the context is 320 tokens"):
        draw(sampler, WEIGHTS, max_new_tokens=400)
    with pytest.raises(ValueError, match="token by token without log Z_t"):
        draw(sampler, WEIGHTS, particles=4)
    with pytest.raises(ModelError, match=r"LoRA policies as a directory, not as 'gpt2'\. Name a directory"):
        draw(VllmSampler("gpt2", places[1], room=Room(4)), WEIGHTS)


def test_the_cache_has_the_size_that_is_asked_for(
    sampler: Any, places: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpo_ray.vllm_plugin.sampler import VllmSampler

    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # which comes first, and other tests set it
    sampler.close()  # one engine in a process at a time
    small = VllmSampler(*places, room=Room(4, kv_cache_gib=0.125))
    draw(small, {REFERENCE: 1.0})
    assert small._latest is not None
    assert small._latest.llm.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes == GIB // 8
    small.close()


def test_vllm_leaves_half_of_a_gpus_free_memory_to_the_actors_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's share is one of the whole memory, and it refuses to start where less is free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * GIB, 80 * GIB))
    assert memory_arguments(None) == {"gpu_memory_utilization": 0.375}
    assert memory_arguments(2.5) == {"gpu_memory_utilization": 0.375, "kv_cache_memory_bytes": 5 * GIB // 2}


def test_logits_that_are_not_numbers_are_an_error(tmp_path: Path) -> None:
    """Weights that are finite, and that no logit can be computed from."""
    from mpo_ray.vllm_plugin.sampler import VllmSampler

    reference, policies = world(tmp_path, "fff")
    file = Path(policies["harmless"]) / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][3:] = 3e38
    save_file(tensors, file, metadata={"format": "pt"})
    broken = VllmSampler(reference, policies, room=Room(4))
    with pytest.raises(StageError, match="the model's logits are not numbers"):
        draw(broken, {"harmless": 1.0})
    broken.close()
