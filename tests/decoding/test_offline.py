"""Completions made together: each is a function of its own prompt and seed, and failures stay with their owner."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpo_ray.decoding.engine import MixtureEngine
from mpo_ray.decoding.offline import Completion, Recipe, check_recipe, complete, row_seed
from mpo_ray.decoding.open_engine import engine_of
from mpo_ray.decoding.protocol import Mode, RequestError, Sampling
from mpo_ray.policies.loading import load_tokenizer
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.policies.mixture_config import MixtureConfig
from tests.policies.material import WEIGHTS, make_material, write

PROMPTS = [[1, 8, 9], [1, 9, 10, 11, 12], [1, 13], [1, 8], [1, 10, 14, 15]]
TOKEN = Recipe(Sampling(max_tokens=6), Mode(), WEIGHTS)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three policies with full weights, far apart: Z is small."""
    root = tmp_path_factory.mktemp("offline")
    return write(make_material(root / "material"), root / "artefact", "full")


@pytest.fixture(scope="module")
def mixture(artefact: Path) -> MixtureForCausalLM:
    return MixtureForCausalLM.from_pretrained(artefact)


def engine(mixture: MixtureForCausalLM, max_num_seqs: int) -> MixtureEngine:
    return engine_of(mixture, load_tokenizer(mixture.name_or_path), max_num_seqs=max_num_seqs, max_waiting=2)


def drawn(mixture: MixtureForCausalLM, recipe: Recipe, rows: list[int], max_num_seqs: int) -> dict[int, Completion]:
    requests = [recipe.request(str(row), PROMPTS[row], seed=row_seed(0, row, 0)) for row in rows]
    return dict(zip(rows, complete(engine(mixture, max_num_seqs), requests), strict=True))


@pytest.mark.parametrize("mode", [Mode(), Mode("smc", 4), Mode("rejection", 3, max_attempts=5000)])
def test_a_completion_does_not_depend_on_who_is_made_with_it(mixture: MixtureForCausalLM, mode: Mode) -> None:
    """One lane for each, as many as there are, in the other order, alone: the same tokens, text and diagnostics."""
    recipe = Recipe(TOKEN.sampling, mode, WEIGHTS)
    together = drawn(mixture, recipe, [0, 1, 2, 3, 4], 5 * mode.particles)
    assert len({one.tokens for one in together.values()}) > 1
    for other in (
        drawn(mixture, recipe, [4, 3, 2, 1, 0], 2 * mode.particles),
        drawn(mixture, recipe, [2], mode.particles),
    ):
        for row, one in other.items():
            assert (one.tokens, one.text, one.finish_reason) == (
                together[row].tokens,
                together[row].text,
                together[row].finish_reason,
            )
            assert one.diagnostics is not None
            assert one.diagnostics.log_z == pytest.approx(together[row].diagnostics.log_z, abs=1e-4)


def test_what_rejection_does_not_accept_fails_alone(mixture: MixtureForCausalLM) -> None:
    """Acceptance is Z, and the attempts are few: some fail, with the reason, and the others are whole."""
    recipe = Recipe(TOKEN.sampling, Mode("rejection", 2, max_attempts=20), WEIGHTS)
    requests = [recipe.request(str(n), PROMPTS[n % 5], seed=n) for n in range(40)]
    counted: list[tuple[int, int]] = []
    finished = complete(engine(mixture, 8), requests, show=lambda done, total: counted.append((done, total)))
    failed = [one for one in finished if one.error is not None]
    assert 0 < len(failed) < 40
    assert all("20 attempts were made and none was accepted" in str(one.error) for one in failed)
    assert all(one.tokens == () for one in failed)
    assert all(one.tokens and one.diagnostics for one in finished if one.error is None)
    assert counted == [(n, 40) for n in range(1, 41)]


def test_seeds_differ_between_rows_samples_and_runs() -> None:
    seeds = [row_seed(seed, row, sample) for seed in range(3) for row in range(5) for sample in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("recipe", "prompt", "param"),
    [
        (Recipe(Sampling(max_tokens=6, top_p=0.9), Mode("smc", 4), WEIGHTS), [1], "top_p"),
        (Recipe(Sampling(max_tokens=6, temperature=2.0), Mode("rejection", 4), WEIGHTS), [1], "temperature"),
        (Recipe(Sampling(max_tokens=60), Mode(), WEIGHTS), [1] * 5, "prompt"),
        (Recipe(Sampling(max_tokens=6), Mode("smc", 0), WEIGHTS), [1], "mode"),
        (Recipe(Sampling(max_tokens=6), Mode(), WEIGHTS), [99], "prompt"),
    ],
)
def test_what_the_engine_refuses_is_refused_before_a_model_is_opened(
    mixture: MixtureForCausalLM, artefact: Path, recipe: Recipe, prompt: list[int], param: str
) -> None:
    """The same error, from config.json alone."""
    with pytest.raises(RequestError) as early:
        check_recipe(recipe, MixtureConfig.from_pretrained(artefact), prompt)
    with pytest.raises(RequestError) as late:
        complete(engine(mixture, 4), [recipe.request("0", prompt, seed=0)])
    assert (early.value.param, str(early.value)) == (param, str(late.value))
