"""The sampler of a run's stages: the models' own distributions, reproducibly, with ends where they belong."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_ray.decoding.protocol import RequestError
from mpo_ray.decoding.sampler import EnsembleSampler, MixtureSampler, Room, sampling_recipe
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.policies.kv_blocks import BLOCK_TOKENS
from mpo_ray.policies.loading import ModelError, load_model
from mpo_ray.policies.mixture import MixtureForCausalLM, mixture_of, mixture_of_one
from tests.tiny import next_logprobs, tiny_llama, tiny_lora, tiny_tokenizer

PROMPTS = [[1, 8, 9, 10], [1, 12]]
EOS = 2
ROOM = Room(max_num_seqs=16)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A reference, two adapters of it, and a policy with weights of its own."""
    root = tmp_path_factory.mktemp("sampler")
    base = tiny_llama(root / "base", tiny_tokenizer(), seed=5)
    adapters = {name: str(tiny_lora(root / name, base, seed=k)) for k, name in enumerate("ab", start=1)}
    return {"base": str(base), **adapters, "full": str(tiny_llama(root / "full", tiny_tokenizer(), seed=6))}


@pytest.fixture(scope="module")
def sampler(places: dict[str, str]) -> MixtureSampler:
    return MixtureSampler(mixture_of_one("model", load_model(places["base"])), ROOM)


def draw(
    sampler: MixtureSampler | EnsembleSampler,
    weights: Mapping[str, float] | None = None,
    *,
    num: int = 1,
    limit: int = 6,
    seed: int = 0,
    ends: tuple[int, ...] = (EOS,),
    prompts: list[list[int]] = PROMPTS,
    **how: Any,
) -> list[list[Any]]:
    recipe = sampling_recipe(weights or {"model": 1.0}, max_new_tokens=limit, **{"temperature": 1.0, **how})
    return sampler.draw(prompts, recipe, num=num, end_ids=ends, seed=seed)


def test_first_tokens_follow_the_models_distribution(sampler: MixtureSampler, places: dict[str, str]) -> None:
    """4000 draws: total variation distance from π(· | x) stays below what chance gives at 25 tokens."""
    model = load_model(places["base"])
    for prompt, completions in zip(PROMPTS, draw(sampler, num=4000, limit=1), strict=True):
        counts = Counter(c.tokens[0] for c in completions)
        exact = next_logprobs(model, prompt).exp()
        assert sum(abs(counts[v] / 4000 - float(exact[v])) for v in range(len(exact))) / 2 < 0.04


def test_temperature_zero_is_greedy(sampler: MixtureSampler, places: dict[str, str]) -> None:
    model = load_model(places["base"])
    for prompt, [completion] in zip(PROMPTS, draw(sampler, temperature=0.0), strict=True):
        ids = list(prompt)
        for token in completion.tokens:
            assert token == int(next_logprobs(model, ids).argmax())
            ids.append(token)


def test_the_seed_decides_and_the_global_generator_does_not(sampler: MixtureSampler) -> None:
    first = draw(sampler, num=8)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert draw(sampler, num=8) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(sampler, num=8, seed=1) != first


@pytest.mark.parametrize("particles", [1, 4])
def test_what_is_drawn_is_the_same_however_many_are_decoded_at_a_time(places: dict[str, str], particles: int) -> None:
    """A row has random numbers of its own; a prompt of several blocks is computed once, or copied, or read in place."""
    prompts = [[1, *range(3, 23), *range(3, 23)], [1, 12]]
    ensemble = Ensemble(places["base"], {name: places[name] for name in "ab"})
    drawn = []
    for num_seqs in (1, 3, 64):
        sampler = EnsembleSampler(ensemble, Room(num_seqs))
        found = draw(sampler, {"a": 0.3, "b": 0.7}, num=5, limit=12, particles=particles, log_z=True, prompts=prompts)
        drawn.append([[c.tokens for c in group] for group in found])
        sums = [c.log_z_hat for group in found for c in group]
        assert all(isinstance(value, float) for value in sums)
    assert drawn[0] == drawn[1] == drawn[2]
    assert len({len(tokens) for group in drawn[0] for tokens in group}) > 2


def test_a_completion_ends_with_its_first_end_token_or_at_the_limit(sampler: MixtureSampler) -> None:
    completions = [c for group in draw(sampler, num=64, limit=12) for c in group]
    assert {c.ended for c in completions} == {True, False}
    for completion in completions:
        assert completion.tokens.count(EOS) == completion.ended
        assert completion.tokens[-1] == EOS if completion.ended else len(completion.tokens) == 12


def test_a_lower_limit_cuts_the_same_completions_earlier(sampler: MixtureSampler) -> None:
    long = [c.tokens for group in draw(sampler, num=10, limit=12) for c in group]
    short = [c.tokens for group in draw(sampler, num=10, limit=5) for c in group]
    assert short == [tokens[:5] for tokens in long]


def test_each_end_token_ends_a_completion(sampler: MixtureSampler) -> None:
    """What came before it is what is drawn without it; the first of them is the last id."""
    whole = draw(sampler, limit=12)
    common = whole[0][0].tokens[3]
    ended = draw(sampler, limit=12, ends=(EOS, common))
    for before, after in zip(whole, ended, strict=True):
        tokens = before[0].tokens
        place = next((n for n, token in enumerate(tokens) if token in (EOS, common)), None)
        assert after[0].tokens == (tokens if place is None else tokens[: place + 1])
        assert after[0].ended == (place is not None)
    assert ended[0][0].ended
    assert len(ended[0][0].tokens) <= 4


def test_a_prompt_is_computed_once_for_all_its_completions(places: dict[str, str]) -> None:
    """But for the tokens behind its last full block."""
    model, num = load_model(places["base"]), 8
    sampler = MixtureSampler(mixture_of_one("model", model), ROOM)
    prompt = [1, *range(3, 23), *range(3, 23)]
    computed: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda layer, inputs, out: computed.append(out.shape[1]))
    drawn = draw(sampler, num=num, limit=1, prompts=[prompt])
    hook.remove()
    assert len(drawn[0]) == num
    assert sum(computed) == len(prompt) + (num - 1) * (len(prompt) % BLOCK_TOKENS)


def test_the_cache_is_given_back_when_all_is_drawn(sampler: MixtureSampler) -> None:
    draw(sampler, num=4, limit=40)
    assert sampler._runner.kv_blocks == 1


def test_a_cache_that_is_too_small_is_refused_with_the_number_that_would_do(places: dict[str, str]) -> None:
    mixture = mixture_of_one("model", load_model(places["base"]))
    small = MixtureSampler(mixture, Room(4, kv_cache_gib=1e-6))
    with pytest.raises(ModelError, match=r"kv_cache_gib: .* one request can need 44\. Set kv_cache_gib to"):
        draw(small, limit=40)


def test_a_text_beyond_the_models_context_is_refused_for_that(sampler: MixtureSampler) -> None:
    with pytest.raises(
        RequestError, match=r"the prompt has 4 tokens and the completion up to 5000; the context is \d+"
    ):
        draw(sampler, limit=5000)


def test_scores_are_the_same_before_and_after_a_draw(places: dict[str, str]) -> None:
    """To the last digit, so that a run that was broken off in between ends alike."""
    texts = [(PROMPTS[0], [5, 6, 7, EOS]), (PROMPTS[1], [9, EOS])]
    how: dict[str, Any] = {"batch_size": 2, "pad_id": 0}
    names = ["reference", "a", "full"]
    ensemble = Ensemble(places["base"], {name: places[name] for name in ("a", "full")})
    sampler = EnsembleSampler(ensemble, ROOM)
    before = ensemble.logprobs(names, texts, **how)
    draw(sampler, {"full": 1.0})
    assert ensemble.logprobs(names, texts, **how) == before


OUT_OF_MEMORY = """
import resource, sys
import psutil, torch
from mpo_ray.decoding.sampler import EnsembleSampler, Room, sampling_recipe
from mpo_ray.out_of_memory import memory_told
from mpo_ray.policies.ensemble import Ensemble
torch.set_num_threads(1)
sampler = EnsembleSampler(Ensemble(sys.argv[1], {}), Room(4))
recipe = sampling_recipe({"reference": 1.0}, max_new_tokens=2, temperature=1.0)
def draw(length):
    return sampler.draw([[1, *[5] * length]], recipe, num=1, end_ids=[2], seed=0)
expected = draw(3)
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**26, -1))
try:
    with memory_told("samples", "Lower scoring.batch_size."):
        draw(60_000)
except Exception as error:
    print(type(error).__name__, error)
print(draw(3) == expected)
"""


def test_a_lack_of_memory_in_a_draw_ends_in_the_words_of_its_stage(tmp_path: Path) -> None:
    """A limit of the process stands for a machine that has no more: an attention mask is 245 MB at last."""
    base = tiny_llama(tmp_path, tiny_tokenizer(), seed=5, max_position_embeddings=1 << 16)
    code = [sys.executable, "-c", OUT_OF_MEMORY, str(base)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    words, as_before = done.stdout.splitlines()[-2:]
    assert re.fullmatch(
        r"OutOfMemoryError samples: out of memory: .* could not be had\. Lower scoring\.batch_size\.", words
    )
    assert as_before == "True"


def test_after_an_error_the_sampler_draws_as_before(sampler: MixtureSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was running then is gone, with its places."""
    expected = draw(sampler, num=8)
    steps = itertools.count()

    def failing(*given: Any) -> Any:
        if next(steps) == 2:
            raise KeyboardInterrupt
        return run(*given)

    run = sampler._runner.run
    monkeypatch.setattr(sampler._runner, "run", failing)
    with pytest.raises(KeyboardInterrupt):
        draw(sampler, num=8)
    monkeypatch.undo()
    assert draw(sampler, num=8) == expected


@pytest.mark.parametrize("kind", ["adapters", "full", "both", "none"])
def test_an_ensemble_draws_as_each_of_its_models_does_alone(places: dict[str, str], kind: str) -> None:
    """The reference too, whether it is the base of an adapter or not: the same tokens for the same seed."""
    names = {"adapters": ["a", "b"], "full": ["full"], "both": ["a", "full"], "none": []}[kind]
    ensemble = Ensemble(places["base"], {name: places[name] for name in names})
    together = EnsembleSampler(ensemble, ROOM)
    for name in [*names, "reference"]:
        found = draw(together, {name: 1.0}, num=3, seed=9)
        with Ensemble(places["base"], {name: places[name] for name in names}).model(name) as model:
            alone = _greedy_free(model, name)
            assert [[c.tokens for c in group] for group in found] == alone
    assert draw(together, {"reference": 1.0}) != draw(together, {"reference": 1.0}, seed=1)


def _greedy_free(model: Any, name: str) -> list[list[tuple[int, ...]]]:
    """The draws by plain forward passes: the first token whose cumulative probability exceeds the row's number."""
    import numpy as np

    from mpo_ray.decoding.offline import row_seed

    found = []
    for row, prompt in enumerate(PROMPTS):
        group = []
        for sample in range(3):
            random, tokens = np.random.default_rng(row_seed(9, row, sample)), list[int]()
            while len(tokens) < 6 and EOS not in tokens:
                with torch.no_grad():
                    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
                cumulative = logits.double().softmax(-1).cumsum(-1)
                tokens.append(int((cumulative > random.random()).nonzero()[0]))
            group.append(tuple(tokens))
        found.append(group)
    return found


def test_a_mixtures_log_z_is_measured_along_its_completions(places: dict[str, str]) -> None:
    """Σ_t log Z_t of a completion, by plain passes over the mixture."""
    ensemble = Ensemble(places["base"], {name: places[name] for name in "ab"})
    weights = {"a": 0.6, "b": 0.4}
    mixture: MixtureForCausalLM = mixture_of(ensemble)
    mixture.set_weights(weights)
    found = draw(EnsembleSampler(ensemble, ROOM), weights, num=3, log_z=True)
    for prompt, group in zip(PROMPTS, found, strict=True):
        for completion in group:
            with torch.no_grad():
                logits = mixture(torch.tensor([[*prompt, *completion.tokens]])).logits[0]
            total = float(logits[len(prompt) - 1 : -1].double().logsumexp(-1).sum())
            assert completion.log_z_hat == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize(("particles", "temperature"), [(0, 1.0), (4, 0.7)])
def test_particles_that_cannot_be_are_refused(particles: int, temperature: float) -> None:
    with pytest.raises(ValueError, match="particles"):
        sampling_recipe({"a": 1.0}, max_new_tokens=4, particles=particles, temperature=temperature)


def test_a_family_without_blocks_draws_its_own_distribution_too(tmp_path: Path) -> None:
    """GPT-J is decoded in transformers' own cache, behind the same interface."""
    from transformers import GPTJConfig, GPTJForCausalLM

    torch.manual_seed(0)
    model = GPTJForCausalLM(GPTJConfig(vocab_size=32, n_positions=64, n_embd=16, n_layer=2, n_head=2, rotary_dim=4))
    sampler = MixtureSampler(mixture_of_one("model", model.eval()), ROOM)
    assert [[c.tokens for c in group] for group in draw(sampler, num=3, seed=9)] == _greedy_free(model, "model")
