"""The stages that draw, with vLLM in their actors: tables as with the own engine, drawn anew for another engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from mpo_ray.config import RunConfig
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.records import REFERENCE
from mpo_ray.run import Run
from mpo_ray.stages.evaluating import EVALUATION, PARTS, evaluate
from mpo_ray.stages.sampling import sample
from mpo_ray.stages.stage import Context
from tests.vllm_plugin.mixtures import MARKS, NAMES, TOKENIZER
from tests.vllm_plugin.test_scoring import REWARDS, world

pytestmark = [*MARKS, pytest.mark.usefixtures("cluster")]
WORDS = ["the film was", "I liked a", "acting was"]
FITTED = {"helpful": 0.6, "harmless": 0.4, "2": 0.0}


def config(root: Path, **scoring: Any) -> RunConfig:
    objectives = {name: {"preferences": {"path": "unused.jsonl"}, "reward": REWARDS[name]} for name in NAMES}
    return RunConfig.model_validate(
        {
            "name": "run",
            "storage": str(root),
            "reference": {"model": str(root / "reference")},
            "objectives": objectives,
            "scoring": {"prompts_per_part": 2, "batch_size": 4, **scoring},
            "samples": {"samples_per_prompt": 3, "max_new_tokens": 8},
            "evaluation": {"completions_per_prompt": 2, "max_new_tokens": 8, "bootstrap_draws": 20},
        }
    )


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as the stages before leave it: two adapters, a policy with full weights, three prompts."""
    root: Path = tmp_path_factory.mktemp("runs")
    _, policies = world(root, "afa")
    run = Run.open(config(root))
    for name, path in policies.items():
        shutil.copytree(path, run.local / "policies" / name)
        run.write_json(f"policies/{name}/training.json", {"inputs": f"training of {name}"})
    run.write_json("fit.json", {"weights": FITTED, "alternatives": {}})
    rows = [{"prompt_id": f"{i:016x}", "prompt": text, "is_chat": False} for i, text in enumerate(WORDS)]
    for kind in ("fit", "evaluation"):
        for index, start in enumerate(range(0, len(rows), 2)):
            table = pa.Table.from_pylist(rows[start : start + 2])
            run.write_table(f"prompts/{kind}/part-{index:05d}.parquet", table, inputs=f"{kind} {index}")
    return root


def made(root: Path, **scoring: Any) -> dict[str, tuple[int, pa.Table]]:
    """Draw and evaluate; every file of completions with the time at which it was written."""
    settings = config(root, **scoring)
    run = Run.open(settings, update=True)
    context = Context(settings, run, Console(quiet=True))
    sample(context)
    evaluate(context)
    nodes = [*run.parts("samples"), *run.parts(PARTS)]
    return {node: ((run.local / node).stat().st_mtime_ns, run.read_table(node)) for node in nodes}


def test_both_engines_make_the_same_tables_and_a_change_of_engine_draws_anew(storage: Path) -> None:
    """What vLLM does not draw stays; once it has drawn, nothing is made again, and a lost file becomes what it was."""
    run = Run.at(str(storage / "run"))
    own, by_vllm = made(storage), made(storage, engine="vllm")
    assert by_vllm.keys() == own.keys()
    soups = [node for node in own if "/soup-" in node]
    assert len(soups) == 4
    for node, (time, table) in by_vllm.items():
        before, expected = own[node]
        assert table.schema.equals(expected.schema)
        assert table.num_rows == expected.num_rows
        assert (time == before) is (node in soups), node
        if node not in soups:
            assert table["response"] != expected["response"]
    again = made(storage, engine="vllm", batch_size=3, vllm={"max_model_len": 128})
    assert {node: time for node, (time, _) in again.items()} == {node: time for node, (time, _) in by_vllm.items()}
    lost = [next(node for node in by_vllm if kind in node) for kind in ("samples/harmless", f"{PARTS}/mixture")]
    for node in lost:
        run.remove(node)
    found = made(storage, engine="vllm")
    for node in lost:
        assert found[node][0] != by_vllm[node][0]
        text = [name for name in found[node][1].column_names if name not in ("log_ref", "kl", "log_z")]
        assert found[node][1].select(text) == by_vllm[node][1].select(text)


def test_the_log_probabilities_beside_vllms_samples_are_the_references(storage: Path) -> None:
    made(storage, engine="vllm")
    samples = Run.at(str(storage / "run")).read_table("samples")
    assert {*samples["proposal"].to_pylist()} == {REFERENCE, *NAMES}
    rows = list(zip(samples["prompt_ids"].to_pylist(), samples["response_ids"].to_pylist(), strict=True))
    reference = Ensemble(str(storage / "reference"), {})
    expected = reference.logprobs([REFERENCE], rows, batch_size=4, pad_id=TOKENIZER.pad_token_id)[REFERENCE]
    assert samples["log_ref"].to_pylist() == pytest.approx(expected, abs=1e-4)


def test_the_evaluation_depends_on_the_engine_and_not_on_where_vllm_works(storage: Path) -> None:
    def depends_on(**scoring: Any) -> Any:
        settings = config(storage, **scoring)
        return EVALUATION.depends_on(Context(settings, Run.at(str(storage / "run")), Console(quiet=True)))

    by_vllm = depends_on(engine="vllm")
    assert by_vllm == depends_on(engine="vllm", vllm={"tensor_parallel_size": 2}) != depends_on()
    assert by_vllm != depends_on(engine="vllm", vllm={"quantization": "fp8"})
