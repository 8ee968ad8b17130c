"""The client: what is tried again and how long it waits, what is an error at once, and that the key stays secret."""

from __future__ import annotations

import json
import logging
import pickle
import socket
import threading
import time
from email.utils import formatdate
from typing import Any

import pytest

from mpo_ray.evaluation.judge_client import Answer, ChatClient, JudgeError, RefusedError
from mpo_ray.evaluation.judge_cost import Budget
from tests.evaluation.judge_server import JudgeServer, always_a, failure

KEY = "sk-very-secret-4711"


class Waits(list[float]):
    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def client(url: str, waits: Waits | None = None, **changes: Any) -> ChatClient:
    settings = {"budget": Budget(max_tokens=64), "retries": 3, "timeout_s": 60.0, "max_tokens": 64, **changes}
    return ChatClient(url, settings.pop("model", "judge-1"), pause=Waits() if waits is None else waits, **settings)


def ask(server: JudgeServer, waits: Waits | None = None, **changes: Any) -> Answer:
    with client(server.url, waits, **changes) as chat:
        return chat.ask("Which?")


def test_a_question_is_one_user_message_with_the_sampling_settings_and_the_key() -> None:
    with JudgeServer(always_a, key=KEY) as server:
        answer = ask(server, api_key=f" {KEY}\n", temperature=0.5)
    assert answer == Answer("The first reads better.\nVerdict: A", 1, 8, 0.0)
    assert server.bodies == [
        {"messages": [{"role": "user", "content": "Which?"}], "model": "judge-1", "temperature": 0.5, "max_tokens": 64}
    ]


def test_retry_after_is_waited_for_and_then_the_answer_comes() -> None:
    waits = Waits()
    with JudgeServer(always_a, first=[failure(429, "slow down", Retry_After="7")]) as server:
        assert ask(server, waits).text.endswith("Verdict: A")
        assert server.num_requests == 2
    assert len(waits) == 1
    assert 7.0 <= waits[0] <= 7.5


def test_retry_after_may_be_a_date() -> None:
    waits = Waits()
    date = formatdate(time.time() + 100, usegmt=True)
    with JudgeServer(always_a, first=[failure(503, Retry_After=date)]) as server:
        ask(server, waits)
    assert 95.0 <= waits[0] <= 100.5


def test_waits_double_and_after_the_last_retry_the_error_says_what_came_back() -> None:
    """Waits lie in 2^n × [1, 1.5] s: they grow even where the jitter is at its worst."""
    waits = Waits()
    with JudgeServer(first=[failure(500, "out of memory")] * 9) as server:
        with pytest.raises(JudgeError) as caught:
            ask(server, waits)
        assert server.num_requests == 4
    assert all(2**n <= wait <= 2**n * 1.5 for n, wait in enumerate(waits))
    assert len(waits) == 3
    message = str(caught.value)
    assert "(model 'judge-1') failed 4 time(s) in a row, the last time with: 500 out of memory" in message
    assert "the same command goes on from there" in message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_a_server_that_asks_for_an_hour_is_not_waited_for() -> None:
    waits = Waits()
    with (
        JudgeServer(first=[failure(429, "quota", Retry_After="3600")]) as server,
        pytest.raises(JudgeError, match="wait 3600 s: repeat the command then"),
    ):
        ask(server, waits)
    assert waits == []


def test_an_answer_that_is_no_chat_completion_is_tried_again_and_then_quoted() -> None:
    page = {"status": 200, "headers": {}, "body": "<html>proxy error</html>"}
    with JudgeServer(always_a, first=[page, {**page, "body": '{"error": {"code": 502}}'}]) as server:
        assert ask(server).text.endswith("Verdict: A")
    with JudgeServer(first=[page] * 9) as server, pytest.raises(JudgeError, match=r"proxy error.*correct evaluation"):
        ask(server)


def test_a_message_without_content_is_the_empty_answer() -> None:
    """A reasoning model that spent max_tokens on its thoughts answers null."""
    body = json.dumps({"choices": [{"message": {"role": "assistant", "content": None}}], "usage": None})
    with JudgeServer(first=[{"status": 200, "headers": {}, "body": body}]) as server:
        assert ask(server) == Answer("")


def test_a_timeout_is_tried_again_and_its_price_is_counted() -> None:
    """The server may have answered and charged: the estimate counts as spent, beside the answer's own price."""
    over = threading.Event()

    def slow_once(question: str) -> str:
        if server.num_requests == 1:
            over.wait(60)
        return always_a(question)

    budget = Budget(output_price=1e6, max_tokens=64)
    with JudgeServer(slow_once) as server:
        answer = ask(server, timeout_s=0.5, retries=20, budget=budget)
        over.set()
        num_timeouts = server.num_requests - 1
    assert answer.cost == 8.0
    assert num_timeouts >= 1
    assert budget.spent == 64.0 * num_timeouts + 8.0


def test_a_server_that_is_never_in_time_is_an_error_that_names_the_setting() -> None:
    over = threading.Event()
    with JudgeServer(lambda question: str(over.wait(60))) as server:
        with pytest.raises(JudgeError, match=r"no answer in time\. Raise evaluation\.judge\.timeout_s"):
            ask(server, timeout_s=0.1, retries=1)
        over.set()


def test_nobody_at_the_url_is_an_error_that_names_url_model_and_remedy() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with client(url, retries=1) as chat:
        for call in (lambda: chat.ask("Which?"), chat.check):
            with pytest.raises(JudgeError) as caught:
                call()
            for part in (url, "'judge-1'", "refused", "Start the judge's server, or correct evaluation.judge.url"):
                assert part in str(caught.value)


def test_a_key_that_is_not_accepted_is_named_by_its_variable_and_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    """The server quotes the key in its refusal; the error and the logs do not."""
    caplog.set_level(logging.DEBUG)
    with JudgeServer(key="another") as server, pytest.raises(JudgeError) as caught:
        ask(server, api_key=KEY, api_key_env="JUDGE_KEY")
    assert "environment variable JUDGE_KEY is not accepted" in str(caught.value)
    assert "Bearer ***" in str(caught.value)
    assert server.num_requests == 0
    with JudgeServer(key="another") as server, pytest.raises(JudgeError, match=r"name the variable .*api_key_env"):
        ask(server)
    assert KEY not in str(caught.value) + repr(caught.value) + caplog.text


def test_a_key_with_a_stray_character_is_refused_without_showing_it() -> None:
    with pytest.raises(JudgeError, match="JUDGE_KEY holds characters that no key has") as caught:
        client("http://127.0.0.1:1/v1", api_key=f"{KEY}\r\nx", api_key_env="JUDGE_KEY")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:pass@host/v1", "for host holds a password or a query"),
        ("http://host/v1?key=pass", "for host holds a password or a query"),
        ("127.0.0.1:8000/v1", "evaluation.judge.url"),
        ("ftp://host/v1", "is no http or https URL"),
        ("http://[::1", "evaluation.judge.url"),
    ],
)
def test_a_url_that_is_none_or_holds_a_secret_is_refused(url: str, message: str) -> None:
    with pytest.raises(JudgeError, match=message) as caught:
        client(url)
    assert "pass@" not in str(caught.value)
    assert "=pass" not in str(caught.value)


def test_a_model_that_is_not_served_is_not_tried_again() -> None:
    with JudgeServer() as server, pytest.raises(JudgeError, match=r"answers 404: .*other does not exist.*not served"):
        ask(server, model="other")
    assert server.num_requests == 1


def test_the_check_lists_the_models_there_are() -> None:
    with JudgeServer(models=["small", "large"]) as server:
        client(server.url + "/", model="large").check()
        with pytest.raises(
            JudgeError, match=r"no such model there\. Set evaluation\.judge\.model to one of: small, large"
        ):
            client(server.url, model="huge").check()
        with pytest.raises(JudgeError, match="answers 404"):
            client(server.url.removesuffix("/v1"), model="large").check()
    assert server.num_requests == 0


def test_one_refused_question_is_not_an_error_of_the_judge() -> None:
    with (
        JudgeServer(first=[failure(400, "maximum context length is 4096 tokens")]) as server,
        pytest.raises(RefusedError, match="400 maximum context length"),
    ):
        ask(server)
    assert server.num_requests == 1


def test_a_server_that_knows_the_limit_by_its_newer_name_is_asked_by_that() -> None:
    refusal = failure(400, "Unsupported parameter: use 'max_completion_tokens' instead.")
    with JudgeServer(always_a, first=[refusal]) as server, client(server.url) as chat:
        chat.ask("Which?")
        chat.ask("Which?")
    assert ["max_completion_tokens" in body for body in server.bodies] == [False, True, True]
    assert "max_tokens" not in server.bodies[1]


def test_a_redirect_is_not_followed_with_the_key() -> None:
    with (
        JudgeServer(first=[failure(308, Location="http://elsewhere/v1")]) as server,
        pytest.raises(JudgeError, match=r"It points to http://elsewhere/v1; set evaluation\.judge\.url"),
    ):
        ask(server, api_key=KEY)
