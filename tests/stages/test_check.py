"""What `check` finds of a run's data: all of it at once."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mpo_ray.config import ConfigError, RunConfig
from mpo_ray.data.lengths import Spread
from mpo_ray.stages.check import Findings, check_run, check_run_engine
from tests.tiny import tiny_llama, tiny_tokenizer

PAIR = {"prompt": "the film", "chosen": "good", "rejected": "bad"}
SAME = {"prompt": "the film", "chosen": "good", "rejected": "good"}
LONG = {"prompt": "film " * 70, "chosen": "good", "rejected": "bad"}
OTHERS = [{"prompt": f"a film {word}", "chosen": "good", "rejected": "bad"} for word in ("was", "I", "it", "not")]


def found(
    root: Path, tables: dict[str, list[Any]], *, model: str | None = None, timing: bool = False, **data: Any
) -> tuple[Findings, str]:
    """What `check` finds in a run on these tables, and what it says on the way."""
    for name, rows in tables.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if model is None:
        model = str(tiny_llama(root / "model", tiny_tokenizer(), seed=0))
    source = {name: {"path": str(root / f"{name}.jsonl")} for name in tables}
    config = RunConfig.model_validate(
        {
            "name": "checked",
            "storage": str(root / "runs"),
            "reference": {"model": model, "sft": {"source": source["texts"]}},
            "objectives": {name: {"preferences": source[name]} for name in ("helpful", "kind")},
            "data": {"heldout_share": 0.0, **data},
            "samples": {"prompts": source["prompts"], "max_new_tokens": 4},
            "evaluation": {"prompts": source["evaluation"], "max_new_tokens": 4},
        }
    )
    out = io.StringIO()
    return check_run(config, Console(file=out, width=200), timing=timing), out.getvalue()


BROKEN: dict[str, list[Any]] = {
    "helpful": [PAIR, SAME, LONG, *OTHERS],
    "kind": [PAIR, LONG, {"prompt": "the film", "chosen": "good"}],
    "texts": [{"text": "good"}, {"text": ""}, {"text": "film " * 70}],
    "prompts": [{"prompt": "the film"}, {"prompt": ""}],
    "evaluation": [{"prompt": "the film"}, {"prompt": "film " * 70}],
}
#: (what a problem begins with, the row that it names)
EXPECTED = [
    ("data: objective 'helpful': 1 of 7 rows are bad", "helpful.jsonl:2: chosen is equal to rejected"),
    ("data: objective 'helpful': 1 of 6 pairs are longer", "helpful.jsonl:3, pair "),
    ("data: objective 'kind': 1 of 3 rows are bad", "kind.jsonl:3: field 'rejected' is missing"),
    ("data: objective 'kind': 1 of 2 pairs are longer", "kind.jsonl:2, pair "),
    ("data: prompts of ", "prompts.jsonl:2: field 'prompt' is empty"),
    ("data: prompts for the evaluation: 1 of 2 are longer than 60 tokens", "evaluation.jsonl:2: 71 tokens"),
    ("data: reference.sft.source: 1 of 3 rows are bad", "texts.jsonl:2: field 'text' is empty"),
    ("data: reference.sft.source: 1 of 2 texts are longer", "texts.jsonl:3: prompt 1 tokens, response 71 tokens"),
]


SOUND: dict[str, list[Any]] = {
    "helpful": [PAIR, *OTHERS],
    "kind": [PAIR],
    "texts": [{"text": "good bad"}],
    "prompts": [{"prompt": "the film"}, {"prompt": "a"}],
    "evaluation": [{"prompt": "the film"}],
}


@pytest.mark.usefixtures("ray_cluster")
class TestData:
    def test_problems_of_all_tables_come_together_with_their_places(self, tmp_path: Path) -> None:
        findings, told = found(tmp_path, BROKEN)
        assert len(findings.problems) == len(EXPECTED), findings.as_text()
        for problem, (beginning, place) in zip(findings.problems, EXPECTED, strict=True):
            assert problem.startswith(beginning)
            assert place in problem
        assert "8 problem(s)" in findings.as_text()
        assert "prefer opposite responses in 0% of" in told  # the conflict of the pairs that are left

    def test_tables_are_read_without_a_model_too(self, tmp_path: Path) -> None:
        """What needs no tokens is found, and the model's own problem is told once."""
        findings, _ = found(tmp_path, BROKEN, model=str(tmp_path / "no-model"))
        bad = [problem for problem in findings.problems if "rows are bad" in problem or "prompts of" in problem]
        assert len(bad) == 4
        assert [p for p in findings.problems if "no such directory" in p] == [findings.problems[0]]
        assert findings.problems[0].startswith("reference model: ")
        assert findings.lengths == []

    def test_lengths_of_all_tables_are_told(self, tmp_path: Path) -> None:
        """The start token counts, and a reply's end token; a row that is left out as too long counts as well."""
        findings, _ = found(tmp_path, {**SOUND, "helpful": [PAIR, *OTHERS, LONG]}, overlong="drop")
        assert findings.problems == []
        by_name = {table.what: table for table in findings.lengths}
        assert list(by_name) == [
            "helpful",
            "kind",
            "prompts for the fit",
            "prompts for the evaluation",
            "texts for SFT",
        ]
        helpful = by_name["helpful"]
        assert (helpful.number, helpful.prompt, helpful.reply) == (6, Spread(4, 71, 71, 15.0), Spread(2, 2, 2, 2.0))
        assert helpful.kept == Spread(6, 6, 6, 5.8)  # the prompt of one has 3 tokens, those of the others 4
        assert helpful.too_long == pytest.approx(1 / 6)
        assert by_name["prompts for the fit"].prompt == Spread(2, 3, 3, 2.5)
        assert by_name["texts for SFT"].reply == Spread(3, 3, 3, 3.0)
        assert " ".join(findings.as_text().split()).count("helpful 6 pairs 4 71 71 2 2 2 16.7 %") == 1


STAGES = ["reference", "pairs", "policies", "samples", "scores", "fit", "evaluation"]


@pytest.mark.usefixtures("ray_cluster")
class TestEstimates:
    @pytest.mark.parametrize("timing", [True, False])
    def test_memory_and_disk_are_always_told_and_time_where_it_is_asked_for(self, tmp_path: Path, timing: bool) -> None:
        findings, _ = found(tmp_path, SOUND, timing=timing)
        assert findings.problems == findings.cautions == []
        assert findings.estimates is not None
        needs = {need.stage: need for need in findings.estimates.needs}
        assert list(needs) == STAGES
        assert all((need.seconds is not None) is timing for need in needs.values())
        assert all(4e8 < need.bytes_each < 2e9 for need in needs.values())
        assert findings.estimates.free_disk is not None
        text, told = findings.as_text(), findings.as_json()["estimates"]
        assert "free here: " in text
        assert ("--no-timing" in text) is not timing
        assert [stage["stage"] for stage in told["stages"]] == STAGES

    def test_there_are_none_where_the_data_are_wrong(self, tmp_path: Path) -> None:
        findings, _ = found(tmp_path, BROKEN, timing=True)
        assert findings.estimates is None
        assert findings.as_json()["cautions"] == []


def engine_config(engine: str, **changes: Any) -> RunConfig:
    source = {"path": "unused.jsonl"}
    wanted = {
        "name": "checked",
        "reference": {"model": "someone/model"},
        "objectives": {"kind": {"preferences": source}},
    }
    return RunConfig.model_validate({**wanted, "scoring": {"engine": engine}, **changes})


def test_adapters_on_a_reference_that_is_a_hub_id_are_refused_for_vllm_before_they_are_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Full weights, an own reference, and the own engine are accepted; a note says whose times are told."""
    monkeypatch.setattr("mpo_ray.cluster.preflight.find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=r"LoRA policies as a directory, not as 'someone/model'\. Name a directory"):
        check_run_engine(engine_config("vllm"))
    trained: dict[str, Any] = {"model": "someone/model", "sft": {"source": {"path": "unused.jsonl"}}}
    full: dict[str, Any] = {"lora": None}
    for accepted in (engine_config("vllm", policies=full), engine_config("vllm", reference=trained)):
        assert check_run_engine(accepted) == "vllm; the times and the memory that are told are those of engine: mpo"
    assert check_run_engine(engine_config("mpo")) is None
