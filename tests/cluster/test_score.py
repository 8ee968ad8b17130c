"""What the actors do with one part: samples of any proposal, scores that keep the columns they are given."""

from typing import Any

import pyarrow as pa
import pytest
import torch

from mpo_ray.cluster.score import Sampler, SampleScorer, draw, sequences
from mpo_ray.config import Actors
from mpo_ray.decoding.offline import Recipe
from mpo_ray.decoding.sampler import MixtureSampler, Room, sampling_recipe
from mpo_ray.policies.ensemble import sequence_logprobs
from mpo_ray.policies.loading import load_model, load_policy, load_rendering
from mpo_ray.policies.mixture import mixture_of_one
from tests.tiny import tiny_llama, tiny_lora, tiny_tokenizer

ACTORS = Actors(batch_size=4).model_dump()
PROMPTS = pa.table(
    {"prompt_id": ["p", "q"], "prompt": ["the film was", "I liked a very long"], "is_chat": [False, False]}
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """A reference and two adapters of it."""
    directory = tmp_path_factory.mktemp("world")
    base = tiny_llama(directory / "base", tiny_tokenizer(), seed=0)
    return str(base), {name: str(tiny_lora(directory / name, base, seed=k)) for k, name in enumerate("ab", start=1)}


def alone_of(model: Any) -> tuple[MixtureSampler, Recipe]:
    recipe = sampling_recipe({"one": 1.0}, max_new_tokens=8, temperature=1.0)
    return MixtureSampler(mixture_of_one("one", model), Room(4)), recipe


def test_the_sampler_draws_from_the_proposal_it_is_told(world: tuple[str, dict[str, str]]) -> None:
    """The same tokens as the policy alone, by PEFT, with the same seed; ids from `first_id`; log π_ref of each row."""
    reference, policies = world
    sampler = Sampler(reference, policies, ACTORS, {}, num_samples=3, max_new_tokens=8)
    rendering = load_rendering(reference)
    pad_id = rendering.tokenizer.pad_token_id
    drawn: dict[str, list[Any]] = {}
    for name, model in (
        ("b", load_policy(policies["b"], reference)),
        ("reference", load_model(reference)),
        ("a", load_policy(policies["a"], reference)),
    ):
        table = sampler(PROMPTS, {"proposal": name, "first_id": 6, "seed": 5})
        alone = draw(*alone_of(model), rendering, PROMPTS, num=3, seed=5)
        drawn[name] = table["response_ids"].to_pylist()
        assert drawn[name] == alone["response_ids"].to_pylist()
        assert table["sample_id"].to_pylist() == [6, 7, 8] * 2
        assert table["num_tokens"].to_pylist() == [len(ids) for ids in drawn[name]]
        assert set(table["proposal"].to_pylist()) == {name}
        log_ref = sequence_logprobs(load_model(reference), sequences(table), batch_size=4, pad_id=pad_id)
        assert torch.allclose(torch.tensor(table["log_ref"].to_pylist()), torch.tensor(log_ref), atol=1e-5)
    assert drawn["a"] != drawn["b"] != drawn["reference"]


def test_the_scorer_computes_the_columns_that_it_is_not_given(world: tuple[str, dict[str, str]]) -> None:
    """Given columns stay to the last bit, impossible values too; an implicit reward follows a given log-ratio."""
    reference, policies = world
    samples = Sampler(reference, {}, ACTORS, {}, num_samples=2, max_new_tokens=8)(
        PROMPTS, {"proposal": "reference", "first_id": 0, "seed": 1}
    )
    rewards = {"a": "implicit", "b": "mpo_ray.data.embedded:concise"}
    scorer = SampleScorer(reference, policies, rewards, 0.5, ACTORS, {})
    whole = scorer(samples, {})
    given = samples.append_column("log_ratio_a", [[float(k) for k in range(4)]]).append_column("reward_b", [[7.0] * 4])
    scored = scorer(given, {})
    assert scored["log_ratio_a"].to_pylist() == [0.0, 1.0, 2.0, 3.0]
    assert scored["reward_a"].to_pylist() == [0.0, 0.5, 1.0, 1.5]
    assert scored["reward_b"].to_pylist() == [7.0] * 4
    assert scored["log_ratio_b"].to_pylist() == pytest.approx(whole["log_ratio_b"].to_pylist(), abs=1e-5)
    assert whole["reward_b"].to_pylist() != [7.0] * 4
