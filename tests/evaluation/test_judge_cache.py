"""The cache of the judge: what is asked once, what a kill leaves, what is damaged."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from mpo_ray.evaluation.judge_cache import AnswerCache
from mpo_ray.evaluation.judge_client import Answer, JudgeError
from tests.evaluation.judge_server import JudgeServer, always_a, prefers_shorter
from tests.evaluation.judging import SHORT_WINS, judge


def test_what_is_known_is_not_asked_again_wherever_the_judge_is(cache: AnswerCache, tmp_path: Path) -> None:
    """The key holds messages, model and sampling settings, not the URL: the second server is never asked."""
    with JudgeServer() as server:
        first = judge(server.url, cache, SHORT_WINS)
    with JudgeServer(always_a) as other:
        again = judge(other.url, AnswerCache(tmp_path / "cache.jsonl"), SHORT_WINS)
        assert other.num_requests == 0
        assert again.of_pairs == first.of_pairs
        assert (first.num_asked, again.num_asked) == (8, 0)


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"max_tokens": 65}, {"model": "judge-2"}])
def test_another_model_or_other_sampling_is_another_question(cache: AnswerCache, change: dict[str, Any]) -> None:
    with JudgeServer(models=["judge-1", "judge-2"]) as server:
        judge(server.url, cache, SHORT_WINS[:1])
        judge(server.url, cache, SHORT_WINS[:1], **change)
        assert server.num_requests == 4


def test_an_answer_is_on_disk_before_the_next_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    lines: list[int] = []

    def counting(question: str) -> str:
        lines.append(len(path.read_text().splitlines()) if path.exists() else 0)
        return prefers_shorter(question)

    with JudgeServer(counting) as server:
        judge(server.url, AnswerCache(path), SHORT_WINS[:2], concurrency=1)
    assert lines == [0, 1, 2, 3]


def test_a_line_cut_off_by_a_kill_is_dropped_and_the_next_does_not_run_into_it(tmp_path: Path) -> None:
    """Wherever the last line is cut, the answers before it are read, and what is added afterwards too."""
    path = tmp_path / "cache.jsonl"
    for key in ("first", "second"):
        AnswerCache(path).add(key, Answer("Verdict: A\n…", 3, 2, 0.25))
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        cache = AnswerCache(path)
        assert cache.get("first") == Answer("Verdict: A\n…", 3, 2, 0.25)
        assert cache.get("second") is None
        cache.add("third", Answer("Verdict: B"))
        assert AnswerCache(path).get("third") == Answer("Verdict: B")
        assert path.read_bytes().startswith(whole[:start])


def test_what_is_in_the_cache_is_never_rewritten(cache: AnswerCache, tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    with JudgeServer() as server:
        judge(server.url, cache, SHORT_WINS[:1])
        before, inode = path.read_bytes(), os.stat(path).st_ino
        judge(server.url, AnswerCache(path), SHORT_WINS)
    assert path.read_bytes().startswith(before)
    assert os.stat(path).st_ino == inode


@pytest.mark.parametrize("line", ["no JSON", '{"key": "k"}', '{"text": "t"}', '["key"]', '{"key": "k", "text": 3}'])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "cache.jsonl"
    AnswerCache(path).add("first", Answer("Verdict: A"))
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(JudgeError, match=r"cache\.jsonl, line 2: not an answer .* Delete this line"):
        AnswerCache(path)


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "cache.jsonl")
    threads = [
        threading.Thread(target=lambda n=n: [cache.add(f"{n}-{i}", Answer(f"{n}" * 500)) for i in range(20)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    read = AnswerCache(tmp_path / "cache.jsonl")
    assert len(read) == 80
    assert read.get("3-19") == Answer("3" * 500)
