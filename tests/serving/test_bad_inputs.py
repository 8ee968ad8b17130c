"""Whatever is sent, the answer says what is wrong with it, and the next request is answered."""

from __future__ import annotations

import json

import pytest

from tests.serving.bad_inputs import BAD, Bad
from tests.serving.live import NAME, PROMPT, Live


@pytest.fixture(scope="module")
def expected(live: Live) -> str:
    return str(live.complete(max_tokens=3, temperature=0)["choices"][0]["text"])


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_bad_request_is_refused_with_its_reason_and_the_next_one_is_answered(
    live: Live, expected: str, bad: Bad
) -> None:
    answer = live.http.request(bad.method, bad.path, content=bad.body, headers=bad.headers)
    assert answer.status_code == bad.status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert bad.words in f"{error['param']}: {error['message']}"
    if bad.status in (400, 422) and "the body" not in error["message"]:
        needed = {"prompt", "messages", "tokens"}  # which may be what is missing
        assert error["param"].split(".")[0] in {*json.loads(bad.body or b""), *needed}
    assert not any(word in answer.text for word in ("Traceback", "pydantic", ".py"))
    assert answer.headers["x-request-id"]
    assert ("allow" in answer.headers) == (bad.status == 405)
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 3, "temperature": 0}
    assert live.post("/v1/completions", body).json()["choices"][0]["text"] == expected


def test_the_list_is_long() -> None:
    assert len({str((bad.method, bad.path, bad.body, bad.headers)) for bad in BAD}) == len(BAD) >= 120


def test_nothing_of_all_this_is_left_in_the_engine(live: Live) -> None:
    assert live.engine.statistics().kv_blocks_used == 0
