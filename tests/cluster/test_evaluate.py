"""The actor's work on one part, without Ray: completions of every kind of candidate in one form."""

from pathlib import Path

import pyarrow as pa
import pytest

from mpo_ray.cluster.evaluate import CandidateEvaluator
from mpo_ray.config import Scoring
from mpo_ray.data.rendering import Rendering
from mpo_ray.decoding.sampler import MixtureSampler, Room, sampling_recipe
from mpo_ray.evaluation.candidates import Candidate
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.policies.loading import load_tokenizer
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.records import REFERENCE
from tests.tiny import tiny_llama, tiny_lora, tiny_tokenizer

PROMPTS = pa.table(
    {
        "prompt_id": [f"{i:016x}" for i in range(3)],
        "prompt": ["the film", "a plot", "acting was"],
        "is_chat": [False] * 3,
    }
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root: Path = tmp_path_factory.mktemp("evaluate")
    base = tiny_llama(root / "base", tiny_tokenizer(), seed=0)
    policies = {name: tiny_lora(root / name, base, seed=i) for i, name in enumerate("ab", start=1)}
    weights = {"a": 0.5, "b": 0.5}
    write_artefact(root / "mixture", objectives=policies, reference=base, copy_reference=False, weights=weights, fit={})
    return {name: str(root / name) for name in ("base", "a", "b", "mixture")}


@pytest.fixture(scope="module")
def evaluator(places: dict[str, str]) -> CandidateEvaluator:
    return CandidateEvaluator(
        reference=places["base"],
        policies={name: places[name] for name in "ab"},
        rewards={"a": "implicit", "b": f"{__file__}:length"},
        beta=0.5,
        actors=Scoring(batch_size=4).model_dump(),
        rendering={},
        num_completions=2,
        max_new_tokens=6,
        temperature=1.0,
    )


def length(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward of objective b."""
    return [float(len(response.split())) for response in responses]


def part(evaluator: CandidateEvaluator, candidate: Candidate, *, seed: int = 7, num_prompts: int = 99) -> pa.Table:
    return evaluator(PROMPTS, {"candidate": candidate.as_json(), "seed": seed, "num_prompts": num_prompts})


def test_every_kind_of_candidate_gives_the_same_columns(evaluator, places) -> None:
    """KL is 0 for the reference alone, log Z is not 0 for the mixture of two alone."""
    candidates = {
        "reference": Candidate("reference"),
        "mixture": Candidate("mixture", (0.5, 0.5)),
        "vertex": Candidate("mixture", (0.0, 1.0)),
        "soup": Candidate("soup", (0.5, 0.5)),
        "model": Candidate("model", path=places["base"]),
    }
    tables = {name: part(evaluator, candidate) for name, candidate in candidates.items()}
    for name, table in tables.items():
        assert table.schema.equals(tables["reference"].schema)
        assert table.num_rows == 6
        assert table["completion_id"].to_pylist() == [0, 1] * 3
        assert all(kl > 0.01 for kl in table["kl"].to_pylist()) is (name not in ("reference", "model"))
        assert any(table["log_z"].to_pylist()) is (name == "mixture")
        responses = table["response"].to_pylist()
        assert table["reward_b"].to_pylist() == length([], responses)
    assert max(map(abs, tables["model"]["kl"].to_pylist())) < 1e-4  # it is the reference under another name


def test_particles_draw_whole_completions_with_their_own_log_z_and_kl(evaluator, places) -> None:
    """log Z is log Ẑ of the completion's particles, and KL is Σ_k λ_k ℓ_k(y) − log Ẑ."""
    mixture = Candidate("mixture", (0.3, 0.7), particles=4)
    table = part(evaluator, mixture)
    assert table.schema.equals(part(evaluator, Candidate("reference")).schema)
    model = MixtureForCausalLM.from_pretrained(places["mixture"])
    tokenizer = load_tokenizer(places["base"])
    prompts = [Rendering(tokenizer).prompt_ids(prompt) for prompt in PROMPTS["prompt"].to_pylist()]
    recipe = sampling_recipe({"a": 0.3, "b": 0.7}, max_new_tokens=6, temperature=1.0, particles=4)
    drawn = MixtureSampler(model, Room(4)).draw(prompts, recipe, num=2, end_ids=[tokenizer.eos_token_id], seed=7)
    expected = [(prompt, completion) for prompt, own in zip(prompts, drawn, strict=True) for completion in own]
    assert table["num_tokens"].to_pylist() == [len(completion.tokens) for _, completion in expected]
    assert table["log_z"].to_pylist() == pytest.approx([completion.log_z_hat for _, completion in expected])
    policies = Ensemble(places["base"], {name: places[name] for name in "ab"})
    rows = [(prompt, completion.tokens) for prompt, completion in expected]
    logprobs = policies.logprobs([REFERENCE, "a", "b"], rows, batch_size=4, pad_id=tokenizer.pad_token_id)
    for i, (_, completion) in enumerate(expected):
        tilt = 0.3 * logprobs["a"][i] + 0.7 * logprobs["b"][i] - logprobs[REFERENCE][i]
        assert table["kl"][i].as_py() == pytest.approx(tilt - completion.log_z_hat, abs=1e-3)


def test_the_same_seed_gives_the_same_completions_whatever_came_before(evaluator) -> None:
    """A part depends on its values alone, so that a resumed run ends with the same files."""
    candidate = Candidate("mixture", (0.3, 0.7))
    first = part(evaluator, candidate)
    part(evaluator, Candidate("soup", (0.4, 0.6)))
    part(evaluator, Candidate("mixture", (1.0, 0.0)))
    assert part(evaluator, candidate).equals(first)
    assert not part(evaluator, candidate, seed=8)["response"].equals(first["response"])
    soup = Candidate("soup", (0.4, 0.6))
    before = part(evaluator, soup)
    part(evaluator, candidate)
    assert part(evaluator, soup).equals(before)


def test_a_part_of_the_grid_takes_the_first_prompts_only(evaluator) -> None:
    found = part(evaluator, Candidate("soup", (0.5, 0.5)), num_prompts=2)
    assert found["prompt_id"].to_pylist() == [f"{i:016x}" for i in (0, 0, 1, 1)]
