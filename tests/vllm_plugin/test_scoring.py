"""The score table by vLLM: that of the package's own models, to 1e-4."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

from mpo_ray.cluster.parts import Part, process_parts
from mpo_ray.cluster.score import Sampler, SampleScorer
from mpo_ray.config import ConfigError, Scoring
from mpo_ray.decoding.sampler import Room
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.policies.loading import ModelError
from mpo_ray.records import REFERENCE
from mpo_ray.run import Run
from tests.vllm_plugin.mixtures import MARKS, NAMES, TOKENIZER, write_mixture

pytestmark = MARKS
SCORING = Scoring(engine="vllm", batch_size=4)
REWARDS = dict.fromkeys(NAMES, "implicit") | {"harmless": "mpo_ray.data.embedded:concise"}


def world(root: Path, kinds: str, family: str = "llama", **sizes: int) -> tuple[str, dict[str, str]]:
    """The reference and the policies of a mixture."""
    write_mixture(root, family, kinds, **sizes)
    return str(root / "reference"), {name: str(root / f"policy-{name}") for name in NAMES}


@pytest.fixture
def one_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM in this process, which is left clean."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.distributed import cleanup_dist_env_and_memory

    yield
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize(
    ("kinds", "family", "arguments"),
    [
        ("aaa", "llama", {}),
        ("afa", "llama", {"max_num_batched_tokens": 32, "max_model_len": 128}),
        ("aaa", "gemma2", {}),
        ("afa", "llama", {"tensor_parallel_size": 2}),
    ],
    ids=["adapters", "mixed, in pieces", "soft-capped", "on two"],
)
@pytest.mark.usefixtures("one_engine")
def test_completions_of_any_length_have_the_same_log_probabilities(
    kinds: str, family: str, arguments: dict[str, int], tmp_path: Path
) -> None:
    """Of one token to more than a pass holds; to 1e-5 a token, and 1e-4 of a few."""
    from mpo_ray.vllm_plugin.scoring import VllmEnsemble

    reference, policies = world(tmp_path, kinds, family, num_key_value_heads=2)
    chance = random.Random(0)

    def ids(most: int) -> list[int]:
        return [chance.randrange(4, len(TOKENIZER)) for _ in range(chance.randint(1, most))]

    rows = [([1, *ids(40)], ids(60)) for _ in range(24)]
    how = {"batch_size": 8, "pad_id": TOKENIZER.pad_token_id}
    names = ["2", REFERENCE, "helpful", "harmless"]
    expected = Ensemble(reference, policies).logprobs(names, rows, **how)
    found = VllmEnsemble(reference, policies, room=Room(8), arguments=arguments).logprobs(names, rows, **how)
    assert list(found) == names
    for name in names:
        for value, same, (_, completion) in zip(found[name], expected[name], rows, strict=True):
            assert value == pytest.approx(same, abs=max(1e-4, 1e-5 * len(completion)))
    assert found["2"] != pytest.approx(found["helpful"], abs=1e-2)


def test_the_table_is_the_same(cluster: None, tmp_path: Path) -> None:
    """By an actor of Ray Data: rows, columns and their order, given columns to the last bit, the others to 1e-4."""
    reference, policies = world(tmp_path / "world", "afa")
    run = Run(str(tmp_path), "scored")
    run.write_text("config.yaml", "{}")
    prompts = pa.table({"prompt_id": ["p", "q"], "prompt": ["the film was", "I liked a"], "is_chat": [False, False]})
    sampler = Sampler(reference, policies, Scoring(batch_size=4).model_dump(), {}, num_samples=3, max_new_tokens=8)
    for name in (REFERENCE, "2"):
        run.write_table(f"samples/{name}.parquet", sampler(prompts, {"proposal": name, "first_id": 0, "seed": 1}))
    columns = {f"{kind}_{name}": "inputs" for kind in ("log_ratio", "reward") for name in NAMES}
    tables = {}
    for engine in ("mpo", "vllm"):
        scoring = SCORING.model_copy(update={"engine": engine})
        parts = [Part(node, f"{engine}/{node}", "all", columns=columns) for node in run.parts("samples")]
        arguments = {"reference": reference, "policies": policies, "rewards": REWARDS, "beta": 0.5, "rendering": {}}
        process_parts(
            run,
            parts,
            SampleScorer,
            {**arguments, "actors": scoring.model_dump()},
            actors=scoring,
            console=Console(quiet=True),
            title="scores",
        )
        tables[engine] = run.read_table(f"{engine}/samples")
    expected, found = tables["mpo"], tables["vllm"]
    assert found.schema.equals(expected.schema, check_metadata=True)
    assert found.select(expected.column_names[:-6]) == expected.select(expected.column_names[:-6])
    for name in columns:
        assert found[name].to_pylist() == pytest.approx(expected[name].to_pylist(), abs=1e-4)
    assert len({tuple(found[f"log_ratio_{name}"].to_pylist()) for name in NAMES}) == len(NAMES)


def test_what_vllm_cannot_open_is_refused(tmp_path: Path, one_engine: None) -> None:
    from mpo_ray.vllm_plugin.scoring import VllmEnsemble

    reference, policies = world(tmp_path / "a", "aaa")
    with pytest.raises(ModelError, match=r"LoRA policies as a directory, not as 'gpt2'\. Name a directory"):
        VllmEnsemble("gpt2", policies, room=Room(8))
    with pytest.raises(ConfigError, match=r"scoring\.vllm\.speed: vLLM has no such engine argument; look at its Engi"):
        VllmEnsemble(reference, policies, room=Room(8), arguments={"speed": 2})
    reference, policies = world(tmp_path / "b", "fff", "codegen")
    with pytest.raises(ValueError, match=r"CodeGenForCausalLM, which vLLM has no model for. Decode this mixture with"):
        VllmEnsemble(reference, policies, room=Room(8))
