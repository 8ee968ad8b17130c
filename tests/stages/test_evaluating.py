"""The evaluation stage on a run made of tiny models: who is decoded, once each, and what another config makes anew."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from rich.console import Console

from mpo_ray.config import RunConfig
from mpo_ray.evaluation.estimates import Estimate
from mpo_ray.evaluation.metrics import Metrics
from mpo_ray.evaluation.verdict import baselines
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.loading import ModelError
from mpo_ray.run import Run
from mpo_ray.stages.evaluating import evaluate
from mpo_ray.stages.stage import Context
from tests.tiny import tiny_llama, tiny_lora, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("ray_cluster")

WORDS = ["the film", "a plot", "acting was", "a long film", "very short"]
FITTED = {"a": 0.75, "b": 0.25}
OTHERS = {"paper": {"weights": {"a": 1.0, "b": 0.0}}, "balanced": {"weights": FITTED}}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as the stages before leave it: two policies, their mixture and fit, five prompts."""
    root: Path = tmp_path_factory.mktemp("runs")
    base = tiny_llama(root / "base", tiny_tokenizer(), seed=0)
    tiny_llama(root / "theirs", tiny_tokenizer(), seed=5)
    run = Run.open(config(root))
    for index, name in enumerate("ab", start=1):
        tiny_lora(run.local / "policies" / name, base, seed=index)
        run.write_json(f"policies/{name}/training.json", {"inputs": f"training of {name}"})
    policies = {name: run.local / "policies" / name for name in "ab"}
    write_artefact(
        run.local / "mixture", objectives=policies, reference=base, copy_reference=False, weights=FITTED, fit={}
    )
    run.write_json("fit.json", {"weights": FITTED, "alternatives": OTHERS})
    rows = [{"prompt_id": f"{i:016x}", "prompt": text, "is_chat": False} for i, text in enumerate(WORDS)]
    for index, start in enumerate(range(0, 5, 2)):
        table = pa.Table.from_pylist(rows[start : start + 2])
        run.write_table(f"prompts/evaluation/part-{index:05d}.parquet", table, inputs=f"prompts {index}")
    return root


def config(root: Path, *, particles: int = 1, **evaluation: Any) -> RunConfig:
    objective = {"preferences": {"path": "unused.jsonl"}, "reward": f"{__file__}:length"}
    settings = {"completions_per_prompt": 2, "max_new_tokens": 5, "bootstrap_draws": 20, **evaluation}
    return RunConfig.model_validate(
        {
            "name": "run",
            "storage": str(root),
            "reference": {"model": str(root / "base")},
            "objectives": {"a": objective, "b": {**objective, "reward": f"{__file__}:goods"}},
            "scoring": {"prompts_per_part": 2},
            "decoding": {"particles": particles},
            "evaluation": settings,
        }
    )


def length(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward of objective a."""
    return [float(len(response.split())) for response in responses]


def goods(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward of objective b."""
    return [float(response.count("good") - response.count("bad")) for response in responses]


def evaluated(root: Path, **settings: Any) -> Run:
    run = Run.open(config(root, **settings), update=True)
    evaluate(Context(config(root, **settings), run, Console(file=io.StringIO())))
    return run


def parts(run: Run) -> dict[str, int]:
    """Every file of completions and when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in (run.local / "evaluation" / "parts").glob("*.parquet")}


def responses(table: pa.Table, candidate: str) -> list[str]:
    rows = table.filter(pc.equal(table["candidate"], candidate))
    return list(rows.sort_by([("prompt_id", "ascending"), ("completion_id", "ascending")])["response"].to_pylist())


def test_candidates_that_are_one_distribution_share_its_completions(storage: Path) -> None:
    """The paper's fit is policy a, the balanced one is MPO's: seven distributions have nine names."""
    run = evaluated(storage, fits=True)
    table = run.read_table("evaluation/completions.parquet")
    assert table["candidate"].unique().to_pylist() == [
        *("reference", "a", "b", "uniform", "soup-uniform", "soup-mpo", "fit-paper", "fit-balanced", "mpo")
    ]
    assert len(parts(run)) == 7 * 3
    assert responses(table, "fit-paper") == responses(table, "a") != responses(table, "b")
    assert responses(table, "fit-balanced") == responses(table, "mpo") != responses(table, "soup-mpo")
    metrics = Metrics.from_json(run.read_json("evaluation/metrics.json"))
    assert metrics.candidates["fit-balanced"].mpo_minus_this == Estimate(0.0)
    assert metrics.num_prompts == 5
    assert not run.exists("evaluation/grid.parquet")
    assert metrics.pareto.hypervolume.num_points == 4


def test_only_what_changed_is_made_anew(storage: Path) -> None:
    """Another mixture, model, grid, confidence or fit keeps the completions that are there; other sampling does not."""
    first = parts(evaluated(storage))
    mixtures, models = {"mostly-b": {"a": 0.1, "b": 0.9}}, {"theirs": str(storage / "theirs")}
    wider = parts(evaluated(storage, mixtures=mixtures, models=models, confidence=0.8))
    assert {name: wider[name] for name in first} == first
    assert len(wider) == len(first) + 2 * 3
    run = evaluated(storage)
    assert parts(run) == first  # what nobody compares any more is removed
    run.write_json("fit.json", {"weights": {"a": 0.4, "b": 0.6}, "alternatives": OTHERS})
    refitted = parts(evaluated(storage))
    run.write_json("fit.json", {"weights": FITTED, "alternatives": OTHERS})
    assert len(refitted.items() & first.items()) == len(first) - 2 * 3  # but MPO and the soup at its weights
    assert not parts(evaluated(storage, temperature=0.5)).items() & first.items()


def test_particles_make_the_mixtures_anew_and_keep_everything_else(storage: Path) -> None:
    """Uniform and MPO; MPO's λ token by token keeps its completions, under another name."""
    run = evaluated(storage)
    first, plain = parts(run), run.read_table("evaluation/completions.parquet")
    run = evaluated(storage, particles=4)
    whole, table = parts(run), run.read_table("evaluation/completions.parquet")
    assert len(whole.items() & first.items()) == len(first) - 3  # but uniform token by token, which nobody asks for
    assert len(whole) == len(first) + 3
    assert responses(table, "mpo-token-level") == responses(plain, "mpo") != responses(table, "mpo")
    assert responses(table, "uniform") != responses(plain, "uniform")
    for name in ("reference", "a", "b", "soup-uniform", "soup-mpo"):
        assert responses(table, name) == responses(plain, name)
    metrics = Metrics.from_json(run.read_json("evaluation/metrics.json"))
    assert metrics.particles == 4
    assert "mpo-token-level" not in baselines(metrics)
    assert not parts(evaluated(storage, particles=3)).items() & (whole.items() - first.items())


def test_the_grid_is_decoded_on_the_first_prompts_and_compared_on_them_alone(storage: Path) -> None:
    """λ = (0, 1), (¼, ¾), (½, ½), (¾, ¼), (1, 0): all but the second have names among the candidates."""
    run = evaluated(storage, grid=4, grid_prompts=3)
    names = [name for name in parts(run) if name.startswith(("mixture", "soup"))]
    assert len(names) == (4 + 2) * 3 + 2 * 2  # policies, uniform, MPO; two soups; and λ = (¼, ¾) of each on two files
    grid, table = run.read_table("evaluation/grid.parquet"), run.read_table("evaluation/completions.parquet")
    assert set(grid["prompt_id"].to_pylist()) == {f"{i:016x}" for i in range(3)}
    assert responses(grid, "grid-4") == responses(grid, "grid-soup-4") == responses(grid, "a")
    assert responses(grid, "grid-3") == responses(grid, "mpo") == responses(table, "mpo")[:6]
    assert len(responses(grid, "grid-1")) == 6
    metrics = Metrics.from_json(run.read_json("evaluation/metrics.json"))
    assert metrics.num_prompts == 5
    assert metrics.pareto.num_prompts == 3
    assert metrics.pareto.hypervolume.num_points == 5
    assert set(metrics.pareto.points) == {
        *metrics.candidates,
        *(f"grid-{s}{i}" for s in ("", "soup-") for i in range(5)),
    }
    assert not {"grid-0", "grid-2", "grid-3", "grid-4"} & set(metrics.pareto.front)


def test_a_model_with_another_vocabulary_is_refused_before_anything_is_decoded(storage: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", tiny_tokenizer(words=["the", "film"]), seed=1)
    before = json.dumps(parts(Run(str(storage), "run")))
    with pytest.raises(ModelError, match=r"evaluation\.models\.theirs: the output layers .* have 9 and 25 entries"):
        evaluated(storage, models={"theirs": str(other)})
    assert json.dumps(parts(Run(str(storage), "run"))) == before
