"""The cap on what a judge may cost, and the estimate that it goes by."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from mpo_ray.evaluation.judge_cache import AnswerCache
from mpo_ray.evaluation.judge_client import JudgeError
from mpo_ray.evaluation.judge_cost import Budget, CapReachedError
from tests.evaluation.judge_server import JudgeServer
from tests.evaluation.judging import SHORT_WINS, judge, kinds, pair


def budget_of(cap: float | None, spent: float = 0.0) -> Budget:
    """Output only: a question is promised 64, and prefers_shorter's answer takes about 8 tokens, 1 money each."""
    return Budget(output_price=1e6, max_tokens=64, cap=cap, spent=spent)


def test_judging_stops_before_the_cap_keeps_what_is_done_and_says_what_would_do(
    cache: AnswerCache, tmp_path: Path
) -> None:
    pairs = [pair("ab", "abcd", str(n)) for n in range(20)]
    with JudgeServer() as server:
        budget = budget_of(cap=150.0)
        found = judge(server.url, cache, pairs, budget=budget, concurrency=4)
        assert budget.spent <= 150.0
        assert found.cost == budget.spent == sum(cache_costs(tmp_path))
        done, missing = kinds(found).count("win"), kinds(found).count("missing")
        assert done > 0
        assert missing > 0
        assert done + missing == 20
        # In the order of the pairs, but for the few that are asked side by side.
        assert kinds(found)[: done - 4] == ["win"] * (done - 4)
        assert kinds(found)[done + 4 :] == ["missing"] * (missing - 4)
        assert found.cap_needed is not None
        asked = server.num_requests
        again = AnswerCache(tmp_path / "cache.jsonl")
        rest = judge(server.url, again, pairs, budget=budget_of(found.cap_needed, again.spent))
        assert kinds(rest) == ["win"] * 20
        assert rest.cap_needed is None
        assert server.num_requests == 40
        assert asked + rest.num_asked == 40


def cache_costs(directory: Path) -> list[float]:
    return [json.loads(line)["cost"] for line in (directory / "cache.jsonl").read_text().splitlines()]


def test_a_cap_counts_what_earlier_commands_of_the_run_have_spent(cache: AnswerCache, tmp_path: Path) -> None:
    with JudgeServer() as server:
        judge(server.url, cache, SHORT_WINS[:1], budget=budget_of(None))
        known = AnswerCache(tmp_path / "cache.jsonl")
        with pytest.raises(JudgeError, match=r"cost_cap 20 does not pay for one more question: 16 is spent"):
            judge(server.url, known, SHORT_WINS[1:2], budget=budget_of(20.0, known.spent))
        assert server.num_requests == 2


def test_an_answer_without_usage_costs_its_estimate(cache: AnswerCache) -> None:
    with JudgeServer(usage=False) as server:
        assert judge(server.url, cache, SHORT_WINS[:1], budget=budget_of(None)).cost == 128.0


def test_the_estimate_learns_from_usage_and_never_from_too_few_tokens() -> None:
    """Prompt tokens are bytes / 3, times the largest ratio seen, at least 1."""
    budget = Budget(input_price=1e6, max_tokens=10)
    assert budget.estimate("x" * 300) == pytest.approx(100.0)
    assert budget.estimate("字" * 100) == pytest.approx(100.0)
    for used, estimate in ((50, 100.0), (200, 200.0), (50, 200.0)):
        with budget.promise("x" * 300) as promise:
            promise.settle((used, 0))
        assert budget.estimate("x" * 300) == pytest.approx(estimate)
    assert budget.spent == pytest.approx(300.0)


def test_a_request_waits_for_others_that_may_turn_out_cheaper() -> None:
    """Two promises of 64 do not fit under 100; once the first has cost 8, the second does."""
    budget, admitted = budget_of(100.0), threading.Event()

    def second() -> None:
        with budget.promise("b") as promise:
            admitted.set()
            promise.settle((1, 8))

    with budget.promise("a") as promise:
        thread = threading.Thread(target=second)
        thread.start()
        assert not admitted.wait(0.1)
        promise.settle((1, 8))
    thread.join(timeout=60)
    assert admitted.is_set()
    assert budget.spent == 16.0


def test_once_the_cap_is_reached_no_smaller_request_slips_through() -> None:
    budget = Budget(input_price=1e6, max_tokens=1, cap=10.0)
    for text in ("x" * 300, "x"):
        with pytest.raises(CapReachedError), budget.promise(text):
            pass
    assert budget.spent == 0.0
