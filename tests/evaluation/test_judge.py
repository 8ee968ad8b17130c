"""A judge behind a real HTTP server: both orders, and answers that cannot be read."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from mpo_ray.evaluation.judge_cache import AnswerCache
from mpo_ray.evaluation.judge_client import JudgeError
from mpo_ray.evaluation.judge_prompt import REMINDER
from tests.evaluation.judge_server import JudgeServer, always_a, failure, prefers_shorter, responses_of
from tests.evaluation.judging import SHORT_WINS, judge, kinds, pair

# ---- both orders ---------------------------------------------------------------------------------------------------


def test_a_judge_with_a_rule_gives_the_verdicts_of_the_rule(cache: AnswerCache) -> None:
    pairs = [pair("ab", "abcd"), pair("abcd", "ab"), pair("ab", "cd"), pair("ab", "ab")]
    with JudgeServer(prefers_shorter) as server:
        found = judge(server.url, cache, pairs)
    assert kinds(found) == ["win", "loss", "tie", "identical"]
    assert [judgement.outcome.score for judgement in found.of_pairs] == [1.0, 0.0, 0.5, 0.5]
    assert found.of_pairs[0].answers == (
        "2 characters against 4.\nVerdict: A",
        "4 characters against 2.\nVerdict: B",
    )


def test_pure_position_bias_gives_one_half_and_is_seen(cache: AnswerCache) -> None:
    with JudgeServer(always_a) as server:
        found = judge(server.url, cache, SHORT_WINS)
    assert kinds(found) == ["first"] * 4
    assert {judgement.outcome.score for judgement in found.of_pairs} == {0.5}


def test_each_question_is_asked_once_and_a_swapped_pair_needs_no_new_ones(cache: AnswerCache) -> None:
    """Two candidates with the same response share answers, and so do candidate and reference in exchanged roles."""
    pairs = [pair("ab", "abcd"), pair("ab", "abcd", candidate="uniform"), pair("abcd", "ab", candidate="other")]
    with JudgeServer() as server:
        found = judge(server.url, cache, pairs)
    assert server.num_requests == 2
    assert kinds(found) == ["win", "win", "loss"]


def test_requests_are_side_by_side_up_to_the_concurrency(cache: AnswerCache) -> None:
    """No answer comes before three requests are there; a fourth never is."""
    together, lock, inside, most = threading.Barrier(3), threading.Lock(), 0, 0

    def counted(question: str) -> str:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        together.wait(timeout=60)
        with lock:
            inside -= 1
        return prefers_shorter(question)

    pairs = [pair("ab", "abcd", str(n)) for n in range(6)]
    with JudgeServer(counted) as server:
        assert kinds(judge(server.url, cache, pairs, concurrency=3)) == ["win"] * 6
    assert most == 3


# ---- answers that cannot be read -----------------------------------------------------------------------------------


def test_an_unreadable_answer_is_asked_for_again_with_a_reminder(cache: AnswerCache) -> None:
    def forgetful(question: str) -> str:
        return prefers_shorter(question) if REMINDER in question else "Hard to say."

    with JudgeServer(forgetful) as server:
        found = judge(server.url, cache, [pair("ab", "abcd")])
    assert kinds(found) == ["win"]
    assert server.num_requests == 4


def test_an_answer_that_stays_unreadable_is_counted_as_that_and_never_as_a_tie(cache: AnswerCache) -> None:
    """Also where only one order is unreadable; the answers are kept, so that asking again costs nothing."""

    def mute_when_shorter_is_first(question: str) -> str:
        a, b = responses_of(question)
        return "…" if len(a) < len(b) else prefers_shorter(question)

    with JudgeServer(mute_when_shorter_is_first) as server:
        found = judge(server.url, cache, [pair("ab", "abcd")])
        assert kinds(found) == ["unparsed"]
        assert found.of_pairs[0].outcome.score is None
        assert found.of_pairs[0].answers[0] == "…"
        assert server.num_requests == 3
        assert kinds(judge(server.url, cache, [pair("ab", "abcd")])) == ["unparsed"]
        assert server.num_requests == 3


def test_a_refused_question_leaves_its_comparison_out_and_the_others_go_on(cache: AnswerCache) -> None:
    def narrow(question: str) -> str | dict[str, Any]:
        return failure(400, "context too long") if "x" * 50 in question else prefers_shorter(question)

    with JudgeServer(narrow) as server:
        found = judge(server.url, cache, [pair("x" * 50, "abcd"), pair("ab", "abcd")])
        assert kinds(found) == ["refused", "win"]
        assert found.refusal == "400 context too long"
        with pytest.raises(JudgeError, match="refused every question, the first with: 400 context too long"):
            judge(server.url, cache, [pair("x" * 50, "abcd")])


def test_a_judge_that_fails_for_good_ends_it_and_the_answers_until_then_are_kept(cache: AnswerCache) -> None:
    def breaks(question: str) -> str | dict[str, Any]:
        return prefers_shorter(question) if server.num_requests <= 4 else failure(500, "gone")

    with JudgeServer(breaks) as server, pytest.raises(JudgeError, match="failed 2 time"):
        judge(server.url, cache, SHORT_WINS, concurrency=1)
    assert len(cache) == 4
    with JudgeServer() as server:
        assert kinds(judge(server.url, cache, SHORT_WINS)) == ["win"] * 4
        assert server.num_requests == 4
