"""Clients that leave, answers that take too long, requests that fail: their rows are free at once, others go on."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from mpo_ray.decoding.protocol import Diagnostics
from tests.serving.live import NAME, PROMPT, Live, serving

LONG = {"model": NAME, "prompt": PROMPT, "max_tokens": 40, "ignore_eos": True, "n": 32}


class Witness:
    """An observer that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: dict[str, list[tuple[str, Any]]] = {}
        self.rejections: Counter[str] = Counter()

    def request_admitted(self, id: str, prompt_tokens: int, at: float) -> None:
        self.heard[id] = [("admitted", prompt_tokens)]

    def first_token(self, id: str, at: float) -> None:
        self.heard[id].append(("first", at))

    def tokens(self, id: str, count: int, at: float) -> None:
        self.heard[id].append(("tokens", count))

    def finished(self, id: str, reason: str, diagnostics: Diagnostics | None, at: float) -> None:
        self.heard[id].append(("finished", reason))

    def aborted(self, id: str, reason: str, at: float) -> None:
        self.heard[id].append(("aborted", reason))

    def rejected(self, reason: str, at: float) -> None:
        self.rejections[reason] += 1

    def ends(self) -> Counter[tuple[str, Any]]:
        return Counter(events[-1] for events in self.heard.values())


@pytest.fixture
def witness() -> Witness:
    return Witness()


@pytest.fixture
def url(live: Live, witness: Witness) -> Iterator[str]:
    with serving(live.app(observer=witness, timeout_s=30.0)) as url:
        yield url


def wait_until(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    assert holds()


def busy(live: Live) -> int:
    now = live.engine.statistics()
    return now.running + now.waiting + now.kv_blocks_used


def test_a_stream_that_is_left_frees_its_rows(live: Live, url: str, witness: Witness) -> None:
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True}) as answer:
        next(answer.iter_lines())
        assert busy(live) > 16
    wait_until(lambda: busy(live) == 0)
    assert witness.ends()["aborted", "disconnected"] > 16


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_answer_frees_its_rows(
    live: Live, url: str, witness: Witness, stream: bool
) -> None:
    exact = {"mixture": {"mode": "exact", "particles": 8}, "ignore_eos": False, "seed": 0}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{url}/v1/completions", json=LONG | exact | {"stream": stream}, timeout=httpx.Timeout(10, read=0.02)
        )
    wait_until(lambda: len(witness.heard) == 32 and busy(live) == 0)
    assert witness.ends()["aborted", "disconnected"] > 0


def test_200_requests_are_left_and_the_next_is_answered_at_once(live: Live, url: str) -> None:
    """Streams and plain answers, given up after 0 to 30 ms: before they are read, admitted, answered, or in between."""
    address = (urlsplit(url).hostname, urlsplit(url).port)
    for number in range(200):
        body = json.dumps(LONG | {"n": 1 + number % 4, "stream": number % 2 == 0}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        with socket.create_connection(address) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(number % 7 * 0.005)
    began = time.monotonic()
    assert live.post("/v1/completions", LONG | {"n": 1, "max_tokens": 2}).status_code == 200
    assert time.monotonic() - began < 2
    wait_until(lambda: busy(live) == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_ends_and_frees_its_rows(live: Live, witness: Witness, stream: bool) -> None:
    with serving(live.app(observer=witness, timeout_s=0.03)) as url:
        answer = httpx.post(f"{url}/v1/completions", json=LONG | {"stream": stream}, timeout=60)
    assert "request_timeout" in answer.text
    assert answer.status_code == 408 or stream
    assert "[DONE]" not in answer.text
    wait_until(lambda: busy(live) == 0)
    assert witness.ends()["aborted", "request_timeout"] > 0


def test_a_request_that_fails_fails_alone(live: Live, url: str, witness: Witness) -> None:
    """Among others at the same time: those that the engine refuses, and those whose attempts are used up."""
    good = LONG | {"n": 1, "seed": 1, "max_tokens": 20}
    refused = good | {"stop_token_ids": [99]}
    used_up = good | {"ignore_eos": False, "mixture": {"mode": "exact", "method": "rejection", "max_attempts": 1}}
    alone = live.post("/v1/completions", good).json()["choices"][0]["text"]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(
                lambda body: httpx.post(f"{url}/v1/completions", json=body, timeout=60), [good, refused, used_up] * 4
            )
        )
    assert [answer.status_code for answer in answers] == [200, 400, 422] * 4
    assert {answer.json()["choices"][0]["text"] for answer in answers[::3]} == {alone}
    assert witness.ends() == {
        ("finished", "length"): 4, ("aborted", "400"): 4, ("aborted", "nothing_accepted"): 4,
    }  # fmt: skip


def test_an_observer_hears_of_every_completion_once(url: str, witness: Witness) -> None:
    """Admitted, first token, tokens, the end; what is refused before the engine is a rejection."""
    body = {"model": NAME, "prompt": ["the", "a film"], "n": 2, "max_tokens": 3, "ignore_eos": True}
    assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
    assert httpx.post(f"{url}/v1/completions", json=body | {"model": "other"}).status_code == 404
    assert httpx.post(f"{url}/v1/completions", json=body | {"n": -1}).status_code == 400
    assert httpx.post(f"{url}/v1/completions", content=b"").status_code == 415
    wait_until(lambda: witness.ends()["finished", "length"] == 4 and witness.rejections.total() == 3)
    assert witness.rejections == {"model_not_found": 1, "400": 1, "not_json": 1}
    assert sorted(events[0] for events in witness.heard.values()) == [("admitted", n) for n in (2, 2, 3, 3)]
    for events in witness.heard.values():
        names = [name for name, _ in events]
        assert [*names[:3], names[-1]] == ["admitted", "first", "tokens", "finished"]
        # one by one, or some at a time where the machine has much else to do
        assert sum(count for name, count in events if name == "tokens") == 3
        assert names.count("first") == names.count("finished") == 1
        assert sum(value for name, value in events if name == "tokens") == 3
