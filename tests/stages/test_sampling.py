"""What samples, scores and the fit depend on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mpo_ray.policies import precision
from mpo_ray.policies.loading import load_model
from mpo_ray.records import digest
from mpo_ray.run import Run
from mpo_ray.run_file import load_config
from mpo_ray.stages.fitting import FIT
from mpo_ray.stages.sampling import SAMPLES, SCORES
from mpo_ray.stages.stage import Context
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.tiny_run import CONFIG, overrides


def samples_depend_on(root: Path, *changes: str) -> Any:
    config = load_config(CONFIG, [*overrides(root, "sampled"), *changes])
    return SAMPLES.depends_on(Context(config, Run(str(root), "sampled"), Console(quiet=True)))


def test_who_draws_the_samples_decides_over_them_and_where_vllm_works_does_not(tmp_path: Path) -> None:
    own, by_vllm = samples_depend_on(tmp_path), samples_depend_on(tmp_path, "scoring.engine=vllm")
    assert own != by_vllm
    placed = "{max_model_len: 64, gpu_memory_utilization: 0.3, tensor_parallel_size: 2}"
    assert by_vllm == samples_depend_on(tmp_path, "scoring.engine=vllm", f"scoring.vllm={placed}")
    assert by_vllm != samples_depend_on(tmp_path, "scoring.engine=vllm", "scoring.vllm={quantization: fp8}")


def test_the_own_engine_adds_nothing_to_the_digest_of_samples_so_that_older_runs_keep_theirs(tmp_path: Path) -> None:
    config = load_config(CONFIG, overrides(tmp_path, "sampled"))
    precision_and_size = {"prompts_per_part": config.scoring.prompts_per_part, "precision": config.scoring.precision}
    assert samples_depend_on(tmp_path) == [config.samples.model_dump(), precision_and_size, config.seed]


def test_who_computes_the_scores_decides_nothing_about_them(tmp_path: Path) -> None:
    def depends_on(*changes: str) -> Any:
        config = load_config(CONFIG, [*overrides(tmp_path, "scored"), *changes])
        return SCORES.depends_on(Context(config, Run(str(tmp_path), "scored"), Console(quiet=True)))

    by_vllm = depends_on("scoring.engine=vllm", "scoring.vllm={max_model_len: 64}", "scoring.num_actors=3")
    assert by_vllm == depends_on() != depends_on("scoring.precision=bf16")


def test_the_fit_depends_on_the_order_of_the_objectives_and_the_scores_do_not(tmp_path: Path) -> None:
    """Scores have a column for each name; λ is a list, whose numbers would change their owners."""
    config = load_config(CONFIG, overrides(tmp_path, "ordered"))
    turned = config.model_copy(update={"objectives": dict(reversed(config.objectives.items()))})
    contexts = [Context(one, Run(str(tmp_path), "ordered"), Console(quiet=True)) for one in (config, turned)]
    before, after = (FIT.depends_on(context) for context in contexts)
    assert digest(before) != digest(after)
    assert digest(SCORES.depends_on(contexts[0])) == digest(SCORES.depends_on(contexts[1]))


def test_what_auto_stands_for_is_decided_once_for_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that times the product otherwise goes on in the precision that the run has begun in."""
    bases = []
    for name in ("first", "second"):
        half = load_model(str(tiny_llama(tmp_path / "fp32", tiny_tokenizer(), seed=len(bases)))).to(torch.bfloat16)
        half.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        bases.append(tmp_path / name)

    def decided(base: Path, *, slower: bool, auto: str = "auto") -> str:
        monkeypatch.setattr(precision, "_is_slower", lambda dtype: slower)
        changes = [f"reference.model={base}", "reference.sft=null", f"scoring.precision={auto}"]
        config = load_config(CONFIG, [*overrides(tmp_path, "auto"), *changes])
        return Context(config, Run(str(tmp_path), "auto"), Console(quiet=True)).scoring().precision

    assert decided(bases[0], slower=False) == "bf16"
    assert decided(bases[0], slower=True) == "bf16"
    assert decided(bases[1], slower=True) == "fp32"  # for another reference
    assert decided(bases[1], slower=True, auto="fp16") == "fp16"
