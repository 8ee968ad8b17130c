"""The engine is among the inputs of what it draws, and of nothing else."""

from __future__ import annotations

import pyarrow as pa
import pytest
from rich.console import Console

from mpo_ray.config import RunConfig
from mpo_ray.evaluation.candidates import Candidate
from mpo_ray.records import REFERENCE
from mpo_ray.run import Run
from mpo_ray.stages.evaluating import _parts
from mpo_ray.stages.sampling import _sample_part
from mpo_ray.stages.stage import Context
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Context]:
    """One run directory, seen with each engine: two policies that were trained, and a file of prompts for each use."""
    root = tmp_path_factory.mktemp("runs")
    model = tiny_llama(root / "model", tiny_tokenizer(), seed=0)
    objective = {"preferences": {"path": "unused.jsonl"}, "reward": "mpo_ray.data.embedded:concise"}
    raw = {"name": "run", "storage": str(root), "reference": {"model": str(model)}}
    configs = {
        engine: RunConfig.model_validate(
            {**raw, "objectives": {"a": objective, "b": objective}, "scoring": {"engine": engine}}
        )
        for engine in ("mpo", "vllm")
    }
    run = Run.open(configs["mpo"])
    prompts = pa.table({"prompt_id": ["p"], "prompt": ["the film"], "is_chat": [False]})
    for kind in ("fit", "evaluation"):
        run.write_table(f"prompts/{kind}/part-00000.parquet", prompts, inputs=kind)
    for name in "ab":
        run.write_json(f"policies/{name}/training.json", {"inputs": f"training of {name}"})
    return {engine: Context(config, run, Console(quiet=True)) for engine, config in configs.items()}


@pytest.mark.parametrize("proposal", [REFERENCE, "a"])
def test_a_file_of_samples_is_another_with_another_engine(contexts: dict[str, Context], proposal: str) -> None:
    own, by_vllm = (
        _sample_part(context, proposal, 0, 0, "prompts/fit/part-00000.parquet") for context in contexts.values()
    )
    assert own.target == by_vllm.target
    assert own.values == by_vllm.values
    assert own.inputs != by_vllm.inputs


@pytest.mark.parametrize(
    ("candidate", "by_vllm"),
    [
        (Candidate("reference"), True),
        (Candidate("mixture", (0.0, 1.0)), True),
        (Candidate("mixture", (0.3, 0.7)), True),
        (Candidate("soup", (0.0, 1.0)), True),  # the same distribution as the policy
        (Candidate("mixture", (0.3, 0.7), particles=4), False),
        (Candidate("soup", (0.3, 0.7)), False),
        (Candidate("model", path="someone/model"), False),
    ],
    ids=str,
)
def test_a_file_of_completions_is_another_where_vllm_draws_the_candidate(
    contexts: dict[str, Context], candidate: Candidate, by_vllm: bool
) -> None:
    [own], [other] = (_parts(context, candidate) for context in contexts.values())
    assert own.target == other.target
    assert own.values == other.values
    assert (own.inputs != other.inputs) is by_vllm
