"""The judge's stage on a real table of completions: what it leaves, when it is done again, and what a check finds."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from mpo_ray.config import RunConfig
from mpo_ray.evaluation.judge_client import JudgeError
from mpo_ray.records import encode_prompt
from mpo_ray.run import Run
from mpo_ray.stages.judging import JUDGE, check_judge, check_judge_settings, pairs_to_judge
from mpo_ray.stages.pipeline import stages_of
from mpo_ray.stages.stage import Context, run_stage
from tests.evaluation.judge_server import JudgeServer, always_a, prefers_shorter
from tests.evaluation.world import OBJECTIVES, completions

CANDIDATES = ["concise", "detailed", "mpo", "positive", "uniform"]
NUM_PROMPTS = 12


def context(storage: Path, **judge: Any) -> Context:
    """A run in `storage` whose completions are there; `judge` is that part of its config, none if empty."""
    settings = {"model": "judge-1", "num_prompts": NUM_PROMPTS, "retries": 0, **judge} if judge else None
    config = RunConfig.model_validate(
        {
            "name": "judged",
            "storage": str(storage),
            "reference": {"model": "embedded"},
            "objectives": {name: {"preferences": {"embedded": "pairs"}} for name in OBJECTIVES},
            "evaluation": {"judge": settings, "bootstrap_draws": 100},
        }
    )
    run = Run.open(config, update=True)
    if not run.exists("evaluation/completions.parquet"):
        run.write_table("evaluation/completions.parquet", completions(num_prompts=30))
    return Context(config, run, Console(file=io.StringIO(), width=400), {"evaluation": "as it is"})


def result(context: Context) -> dict[str, Any]:
    return context.run.read_json("evaluation/judge.json")


def printed(context: Context) -> str:
    return context.console.file.getvalue()  # type: ignore[attr-defined]


def test_a_judge_that_prefers_shorter_text_ranks_the_candidates_by_length(tmp_path: Path) -> None:
    """Win rates, counts and the table of verdicts agree with the rule, applied by hand to the same completions."""
    with JudgeServer(prefers_shorter) as server:
        run_stage(judged := context(tmp_path, url=server.url), JUDGE)
        num_requests = server.num_requests
    found = result(judged)
    assert sorted(found["candidates"]) == CANDIDATES
    assert found["num_comparisons"] == len(CANDIDATES) * NUM_PROMPTS * len(OBJECTIVES)
    assert found["num_questions"] == found["num_asked_now"] == num_requests
    assert found["remarks"] == []
    rows = judged.run.read_table("evaluation/judge.parquet").to_pylist()
    for candidate in CANDIDATES:
        scores = []
        for row in rows:
            if row["candidate"] == candidate and row["objective"] == "concise":
                shorter = len(row["response"]) - len(row["reference"])
                scores.append(0.5 if shorter == 0 else float(shorter < 0))
                assert row["score"] == scores[-1]
        assert len(scores) == NUM_PROMPTS
        estimate = found["candidates"][candidate]["win_rates"]["concise"]
        assert estimate["value"] == pytest.approx(sum(scores) / NUM_PROMPTS)
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    values = {name: found["candidates"][name]["minimum_win_rate"]["value"] for name in CANDIDATES}
    assert max(values, key=lambda name: values[name]) == "concise"
    assert min(values, key=lambda name: values[name]) == "detailed"


def test_pure_position_bias_gives_every_candidate_exactly_one_half(tmp_path: Path) -> None:
    with JudgeServer(always_a) as server:
        run_stage(judged := context(tmp_path, url=server.url), JUDGE)
    found = result(judged)
    assert found["position_bias"] == 1.0
    for candidate in found["candidates"].values():
        for objective in OBJECTIVES:
            rate = candidate["win_rates"][objective]
            assert rate["value"] == 0.5
            assert rate["low"] < 0.5 < rate["high"]  # equal outcomes of a few prompts are no certainty
            assert candidate["tallies"][objective]["first"] == NUM_PROMPTS
            assert candidate["tallies"][objective]["position_bias"] == 1.0


def test_the_stage_is_skipped_when_nothing_changed_and_a_repeat_costs_nothing(tmp_path: Path) -> None:
    """Where the judge is, and how fast it is asked, changes nothing; another criterion does, and asks anew."""
    with JudgeServer() as server:
        assert run_stage(context(tmp_path, url=server.url), JUDGE)
        before = (server.num_requests, (tmp_path / "judged/evaluation/judge.json").read_bytes())
        assert not run_stage(context(tmp_path, url="http://127.0.0.1:9/v1", concurrency=1, retries=3), JUDGE)
        (tmp_path / "judged/evaluation/judge.json").unlink()
        assert run_stage(again := context(tmp_path, url="http://127.0.0.1:9/v1"), JUDGE)
        assert result(again) == {**json.loads(before[1]), "num_asked_now": 0}
        assert server.num_requests == before[0]
        assert run_stage(context(tmp_path, url=server.url, criteria={"concise": "Few words."}), JUDGE)
        # The other two objectives' questions are known; those of `concise` are new.
        assert server.num_requests == before[0] * 4 // 3


def test_a_changed_template_file_is_another_judge(tmp_path: Path) -> None:
    template = tmp_path / "mine.j2"
    own = "{{ criterion }} {{ boundary }} {{ prompt }} {{ response_a }} {{ boundary }} {{ response_b }} {{ boundary }}"
    template.write_text(own)
    before = context(tmp_path, url="http://host/v1", template=str(template)).inputs(JUDGE)
    assert context(tmp_path, url="http://host/v1", template=str(template)).inputs(JUDGE) == before
    template.write_text(own + ".")
    assert context(tmp_path, url="http://host/v1", template=str(template)).inputs(JUDGE) != before


def test_the_cost_cap_is_kept_and_what_is_missing_is_said_everywhere(tmp_path: Path) -> None:
    """Whole prompts are done, for every candidate alike; a cap that is said to do, does."""
    prices = {"price_per_million_output": 1e6, "max_tokens": 32}
    with JudgeServer() as server:
        run_stage(judged := context(tmp_path, url=server.url, cost_cap=1000.0, **prices), JUDGE)
        found = result(judged)
        assert found["cost"] <= 1000.0
        missing = [tally["missing"] for c in found["candidates"].values() for tally in c["tallies"].values()]
        assert max(missing) - min(missing) <= 2
        assert 0 < sum(missing) < found["num_comparisons"]
        remark = found["remarks"][0]
        assert remark.startswith(f"{sum(missing)} of 180 comparisons are missing")
        assert "evaluation.judge.cost_cap 1000" in remark
        assert remark in printed(judged)
        run_stage(more := context(tmp_path, url=server.url, cost_cap=found["cost_cap_needed"], **prices), JUDGE)
        assert result(more)["remarks"] == []
        assert result(more)["cost"] <= found["cost_cap_needed"]


def test_unread_and_refused_comparisons_are_remarked_on(tmp_path: Path) -> None:
    with JudgeServer(lambda question: "A is nicer.") as server:
        run_stage(judged := context(tmp_path, url=server.url, num_prompts=2), JUDGE)
    found = result(judged)
    assert found["candidates"]["mpo"]["win_rates"] == dict.fromkeys(OBJECTIVES)
    assert "30 of 30 comparisons have an answer whose last line is no verdict" in found["remarks"][0]


def test_the_prompts_are_a_seeded_choice_that_does_not_depend_on_the_order_of_rows() -> None:
    table = completions(num_prompts=30)
    pairs = pairs_to_judge(table, OBJECTIVES, 5, seed=0)
    reverse = pa.Table.from_pylist(table.to_pylist()[::-1])
    assert pairs_to_judge(reverse, OBJECTIVES, 5, seed=0) == pairs
    chosen = list(dict.fromkeys(pair.prompt_id for pair in pairs))
    assert list(dict.fromkeys(p.prompt_id for p in pairs_to_judge(table, OBJECTIVES, 8, seed=0)))[:5] == chosen
    assert {pair.prompt_id for pair in pairs_to_judge(table, OBJECTIVES, 5, seed=1)} != set(chosen)
    first = {(r["candidate"], r["prompt_id"]): r["response"] for r in table.to_pylist() if r["completion_id"] == 0}
    for pair in pairs:
        assert pair.response == first[pair.candidate, pair.prompt_id]
        assert pair.reference == first["reference", pair.prompt_id]


def test_points_of_the_grid_are_not_judged_and_chat_prompts_are_written_as_turns() -> None:
    messages = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"})
    text, is_chat = encode_prompt(messages)
    rows = [
        {**row, "candidate": name, "prompt": text, "is_chat": is_chat}
        for row in completions(num_prompts=2).to_pylist()
        if row["candidate"] in ("reference", "mpo")
        for name in ([row["candidate"], "grid-3", "grid-soup-1"] if row["candidate"] == "mpo" else ["reference"])
    ]
    pairs = pairs_to_judge(pa.Table.from_pylist(rows), OBJECTIVES, 5, seed=0)
    assert {pair.candidate for pair in pairs} == {"mpo"}
    assert {pair.prompt for pair in pairs} == {"user: Hi\n\nassistant: Yes?"}
    short = pa.Table.from_pylist([row for row in rows if (row["candidate"], row["prompt_id"]) != ("mpo", "0" * 16)])
    with pytest.raises(JudgeError, match="Candidate 'mpo' has no completion of prompt '0000000000000000'"):
        pairs_to_judge(short, OBJECTIVES, 5, seed=0)


def test_the_key_is_in_no_file_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret-4711")
    with JudgeServer(key="sk-very-secret-4711") as server:
        run_stage(judged := context(tmp_path, url=server.url, api_key_env="JUDGE_KEY", num_prompts=2), JUDGE)
    assert result(judged)["num_asked_now"] > 0
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"very-secret" not in path.read_bytes(), path
    assert "very-secret" not in printed(judged)


def test_other_storage_keeps_the_cache_too(tmp_path: Path) -> None:
    """A run that is not on this machine's disk gets its answers when judging ends, also by an error."""
    storage = f"memory://judging-{os.getpid()}-{tmp_path.name}"
    with JudgeServer() as server:
        config = context(tmp_path, url=server.url, num_prompts=2).config.model_copy(update={"storage": storage})
        run = Run(storage, "judged")
        run.write_table("evaluation/completions.parquet", completions(num_prompts=30))
        judged = Context(config, run, Console(file=io.StringIO()), {"evaluation": "as it is"})
        server.models = []
        with pytest.raises(JudgeError, match="answers 404"):
            run_stage(judged, JUDGE)
        server.models = ["judge-1"]
        run_stage(judged, JUDGE)
        lines = (run.read_text("evaluation/judge_cache.jsonl") or "").splitlines()
        assert len(lines) == result(judged)["num_questions"]
        (run.local / "evaluation/judge_cache.jsonl").unlink()
        run.remove("evaluation/judge.json")
        run_stage(judged, JUDGE)
        assert result(judged)["num_asked_now"] == 0
        shutil.rmtree(run.local)


def test_a_run_has_the_stage_exactly_if_it_has_a_judge_and_the_report_comes_after(tmp_path: Path) -> None:
    assert "judge" not in [stage.name for stage in stages_of(context(tmp_path))]
    names = [stage.name for stage in stages_of(context(tmp_path, url="http://host/v1"))]
    assert names[-3:] == ["evaluation", "judge", "report"]


# ---- what a check finds --------------------------------------------------------------------------------------------


def test_a_check_asks_the_url_and_pays_nothing(tmp_path: Path) -> None:
    with JudgeServer() as server:
        check_judge(context(tmp_path, url=server.url))
        with pytest.raises(JudgeError, match="no such model there"):
            check_judge(context(tmp_path, url=server.url, model="other"))
        check_judge_settings(context(tmp_path, url=server.url, model="other"))
    assert server.num_requests == 0
    check_judge(context(tmp_path))


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"api_key_env": "MPO_RAY_NO_SUCH_KEY"}, "environment variable MPO_RAY_NO_SUCH_KEY .* is not set"),
        ({"template": "none.j2"}, r"none\.j2 cannot be read"),
        ({"criteria": {"concis": "Few words."}}, "names 'concis'; the objectives are positive, concise, detailed"),
        ({"cost_cap": 5.0}, "cost_cap is 5, but both prices are 0"),
        ({"url": "host:8000"}, "evaluation.judge.url"),
    ],
)
def test_settings_that_would_stop_the_judge_are_found_without_asking_it(
    tmp_path: Path, judge: dict[str, Any], message: str
) -> None:
    with pytest.raises(JudgeError, match=message):
        check_judge_settings(context(tmp_path, **{"url": "http://127.0.0.1:9/v1", **judge}))
