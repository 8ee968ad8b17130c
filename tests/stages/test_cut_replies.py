"""Replies that their rows call cut: counted, told, and not learned as finished unless the config says so."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mpo_ray.cluster.score import PairReference, Sampler
from mpo_ray.config import RunConfig, Scoring
from mpo_ray.run import Run
from mpo_ray.stages.data import prepare_data
from mpo_ray.stages.stage import Context
from tests.tiny import tiny_llama, tiny_tokenizer

ACTORS = Scoring(batch_size=4).model_dump()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("cut") / "model", tiny_tokenizer(), seed=0)


def prepared(root: Path, model: Path, **data: Any) -> tuple[Run, dict[str, Any], str]:
    """The run after its data stage, the stage's counts, and what it printed."""
    pairs = [{"prompt": "the film", "chosen": "good", "rejected": "bad", "chosen_finish_reason": "length"}] * 12
    texts = [{"prompt": "the film", "response": "good", "truncated": n % 2 == 0} for n in range(12)]
    for name, rows in (("pairs", pairs), ("texts", texts)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig.model_validate(
        {
            "name": "cut",
            "storage": str(root / "runs"),
            "reference": {"model": str(model), "sft": {"source": {"path": str(root / "texts.jsonl")}}},
            "objectives": {"a": {"preferences": {"path": str(root / "pairs.jsonl")}}},
            "data": {"heldout_share": 0.0, **data},
            "evaluation": {"prompts": {"path": str(root / "pairs.jsonl")}, "max_new_tokens": 4},
            "samples": {"max_new_tokens": 4},
        }
    )
    out = io.StringIO()
    run = Run(config.storage, config.name)
    return run, prepare_data(Context(config, run, Console(file=out, width=200))), out.getvalue()


def test_cut_replies_are_learned_without_an_end_token(tmp_path: Path, model: Path) -> None:
    """Of pairs, scoring and training read the ids that `PairReference` makes; of texts the data stage writes them."""
    run, counts, told = prepared(tmp_path, model)
    end = tiny_tokenizer().eos_token_id
    [part] = run.parts("comparisons/a")
    ids = PairReference(str(model), ACTORS, {})(run.read_table(part), {})
    assert {row[-1] == end for row in ids["chosen_ids"].to_pylist()} == {False}
    assert {row[-1] == end for row in ids["rejected_ids"].to_pylist()} == {True}
    texts = run.read_table("texts")["response_ids"].to_pylist()
    assert sum(row[-1] == end for row in texts) == 6
    assert counts["a"]["cut"]["known"] == 12
    assert counts["sft"]["cut"]["known"] == 6
    assert "objective 'a': 12 replies were cut at a limit, as their rows say, and get no end token" in told
    assert "reference.sft.source: 6 replies were cut" in told


def test_the_config_can_have_them_learned_as_finished(tmp_path: Path, model: Path) -> None:
    run, counts, told = prepared(tmp_path, model, cut_replies="finished")
    end = tiny_tokenizer().eos_token_id
    [part] = run.parts("comparisons/a")
    ids = PairReference(str(model), ACTORS, {})(run.read_table(part), {})
    assert all(row[-1] == end for side in ("chosen", "rejected") for row in ids[f"{side}_ids"].to_pylist())
    assert all(row[-1] == end for row in run.read_table("texts")["response_ids"].to_pylist())
    assert counts["a"]["cut"]["known"] == 12
    assert "are learned as if they ended there" in told


def test_samples_that_reach_the_limit_have_no_end_token(tmp_path: Path, model: Path) -> None:
    """MOPO's candidates are samples: with the limit of 1 token those that are not the end itself are cut."""
    run, _, _ = prepared(tmp_path, model)
    sampler = Sampler(str(model), {}, ACTORS, {}, num_samples=16, max_new_tokens=1)
    [part] = run.parts("prompts/fit")
    rows = sampler(run.read_table(part), {"proposal": "reference", "first_id": 0, "seed": 0}).to_pylist()
    end = tiny_tokenizer().eos_token_id
    assert {row["finished"] for row in rows} >= {False}
    assert all((row["response_ids"][-1] == end) == row["finished"] for row in rows)
