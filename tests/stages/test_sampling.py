"""What samples and scores depend on."""

from pathlib import Path
from typing import Any

from rich.console import Console

from mpo_ray.run import Run
from mpo_ray.run_file import load_config
from mpo_ray.stages.sampling import SCORES
from mpo_ray.stages.stage import Context
from tests.tiny_run import CONFIG, overrides


def test_who_computes_the_scores_decides_nothing_about_them(tmp_path: Path) -> None:
    def depends_on(*changes: str) -> Any:
        config = load_config(CONFIG, [*overrides(tmp_path, "scored"), *changes])
        return SCORES.depends_on(Context(config, Run(str(tmp_path), "scored"), Console(quiet=True)))

    by_vllm = depends_on("scoring.engine=vllm", "scoring.vllm={max_model_len: 64}", "scoring.num_actors=3")
    assert by_vllm == depends_on() != depends_on("scoring.precision=bf16")
