"""A stream says what the plain answer says: its text to the last byte, its log-probabilities, its report."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import pytest

from tests.serving.live import NAME, PROMPT, Live, byte_tokenizer

#: By how much a figure differs with who is decoded beside it.
NOISE = {"mpo": 0.0, "vllm": 1e-4}
#: Bytes of é, € and a few letters, so that characters of two and three bytes are drawn, and broken ones too.
LETTERS = [*byte_tokenizer()("é€ab ", add_special_tokens=False)["input_ids"], *byte_tokenizer()("Ã")["input_ids"][1:]]
BYTES: dict[str, Any] = {
    "prompt": "a", "logit_bias": {str(id): 100 for id in LETTERS}, "max_tokens": 30, "n": 8, "seed": 3,
}  # fmt: skip


def joined(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """By choice: its text, its log-probabilities, and what its last chunk says."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            one = found.setdefault(choice["index"], {"text": "", "tokens": [], "values": [], "offsets": [], "ends": []})
            one["text"] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            logprobs = choice["logprobs"] or {"tokens": [], "token_logprobs": [], "text_offset": []}
            one["tokens"] += logprobs["tokens"]
            one["values"] += logprobs["token_logprobs"]
            one["offsets"] += logprobs["text_offset"]
            if choice["finish_reason"]:
                one["ends"].append((choice["finish_reason"], choice["stop_reason"], choice["mixture"]))
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"logprobs": 2},
        {"logprobs": 1, "echo": True},
        {"stop": ["é€", "ba", "a b"]},
        {"stop": ["€"], "logprobs": 0},
        {"mixture": {"mode": "exact", "particles": 2}, "logit_bias": {}, "n": 2},
    ],
    ids=str,
)
def test_a_stream_is_the_plain_answer_in_pieces(live_bytes: Live, engine_name: str, fields: dict[str, Any]) -> None:
    """Tokens are single bytes, so that characters and stop strings come in parts; nothing of a stop string is sent."""
    asked = BYTES | fields
    if engine_name == "vllm" and "mixture" in fields:
        asked["max_tokens"] = 2  # by rejection, which accepts no long answer of policies that differ so much
    choices = live_bytes.complete(**asked)["choices"]
    stream = joined(live_bytes.stream("/v1/completions", asked))
    assert len(stream) == len(choices)
    for choice in choices:
        one = stream[choice["index"]]
        assert one["text"] == choice["text"]
        [(finish, stop, report)] = one["ends"]
        assert (finish, stop) == (choice["finish_reason"], choice["stop_reason"])
        assert report.pop("log_z") == pytest.approx(choice["mixture"].pop("log_z"), abs=NOISE[engine_name])
        assert report == choice["mixture"]
        logprobs = choice["logprobs"] or {"tokens": [], "token_logprobs": [], "text_offset": []}
        assert one["tokens"] == logprobs["tokens"]
        assert one["values"] == pytest.approx(logprobs["token_logprobs"], abs=NOISE[engine_name])
        assert one["offsets"] == logprobs["text_offset"]
        stops = fields.get("stop", [])
        assert not any(stop in choice["text"] for stop in stops)
        assert not stops or choice["stop_reason"] in (*stops, None)
    if "stop" in fields:
        assert any(choice["stop_reason"] for choice in choices)
    elif not fields:
        assert any("é" in choice["text"] for choice in choices)
        assert any("€" in choice["text"] for choice in choices)


@pytest.mark.parametrize("prompt", [PROMPT, [1, 7, 9], ["the film", "a plot"]], ids=str)
@pytest.mark.parametrize("fields", [{}, {"n": 2, "stop": [" a"]}, {"mixture": {"mode": "exact"}}], ids=str)
def test_a_completion_goes_on_from_its_prompt(
    live: Live, engine_name: str, prompt: Any, fields: dict[str, Any]
) -> None:
    """Its text is what decode(prompt + completion) has behind the prompt's: the space between two words is there,
    with echo and without, in one piece and streamed; so are the tokens of log-probabilities, and their places."""
    asked = {"prompt": prompt, "max_tokens": 6, "seed": 2, "logprobs": 0} | fields
    if engine_name == "vllm" and "mixture" in fields:
        asked["max_tokens"] = 2  # by rejection, which accepts no long answer of policies that differ so much
    prompts = prompt if isinstance(prompt, list) and isinstance(prompt[0], str) else [prompt]
    texts = [one if isinstance(one, str) else live.tokenizer.decode(one, skip_special_tokens=True) for one in prompts]
    plain, echoed = live.complete(**asked)["choices"], live.complete(**asked, echo=True)["choices"]
    streams = [joined(live.stream("/v1/completions", asked | {"echo": echo})) for echo in (False, True)]
    num = asked.get("n", 1)
    assert len(plain) == len(texts) * num
    for choice, echo in zip(plain, echoed, strict=True):
        text, before = choice["text"], texts[choice["index"] // num]
        assert not text or (text[0] == " " and text[1:2] not in ("", " "))
        assert echo["text"] == before + text
        assert [stream[choice["index"]]["text"] for stream in streams] == [text, before + text]
        written = [token for token in choice["logprobs"]["tokens"] if token[0] != "<"]
        assert "".join(written).startswith(text)
        for one in (choice, echo):
            places = zip(one["logprobs"]["tokens"], one["logprobs"]["text_offset"], strict=True)
            inside = [(token, place) for token, place in places if place < len(one["text"]) and token[0] != "<"]
            assert all(one["text"].startswith(token, place) for token, place in inside)
            assert inside or not one["text"]


def test_a_reply_of_a_chat_stands_alone(live: Live) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "the film"}], "max_tokens": 4, "ignore_eos": True}
    text = live.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert text == text.strip() != ""


def test_the_bytes_of_the_tokens_are_the_text(live_bytes: Live) -> None:
    """Parts of a character are named `bytes:…`, and all bytes together decode to the choice's text."""
    body = {"model": NAME, "messages": [{"role": "user", "content": "é"}], "logprobs": True}
    settings = {key: BYTES[key] for key in ("logit_bias", "max_tokens", "seed")}
    [choice] = live_bytes.post("/v1/chat/completions", body | settings | {"n": 1}).json()["choices"]
    content = choice["logprobs"]["content"]
    raw = bytes(byte for token in content for byte in token["bytes"])
    assert raw.decode("utf-8", "replace") == choice["message"]["content"]
    assert any(token["token"].startswith("bytes:\\x") for token in content)


def test_events_come_in_the_order_that_clients_expect(live: Live) -> None:
    """Role first, one finish_reason per choice, usage in a chunk of its own, then [DONE]."""
    body = {"messages": [{"role": "user", "content": "good"}], "n": 3, "max_tokens": 5}
    chunks = live.stream("/v1/chat/completions", body | {"stream_options": {"include_usage": True}})
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    *parts, last = chunks
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
    assert {chunk["usage"] for chunk in parts} == {None}
    for index in range(3):
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in mine[1:])
        assert [bool(choice["finish_reason"]) for choice in mine] == [False] * (len(mine) - 1) + [True]
    assert all("usage" not in chunk for chunk in live.stream("/v1/chat/completions", body))


def test_usage_grows_in_every_chunk_if_asked(live: Live) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = live.stream("/v1/completions", {"prompt": PROMPT, "max_tokens": 6, "stream_options": options, "n": 2})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {4}


def test_the_same_seed_says_the_same_alone_and_among_others(live: Live) -> None:
    """Each of 8 requests at once, of different prompts, lengths, weights and modes, is what it is by itself."""
    requests: list[dict[str, Any]] = [
        {"prompt": prompt, "max_tokens": 8 + number, "seed": number, "temperature": 0.5 + number / 8, **more}
        for number, (prompt, more) in enumerate(
            [
                (PROMPT, {}),
                ("the", {"n": 2}),
                ("a long film", {"mixture": {"weights": {"helpful": 0.1, "harmless": 0.9}}}),
                ("I liked it", {"mixture": {"mode": "exact", "particles": 3}}),
                ("not at all", {"model": f"{NAME}/harmless"}),
                ("good", {"frequency_penalty": 0.7, "top_k": 6}),
                (["plot", "acting was bad"], {"top_p": 0.8}),
                ("very very very", {"min_p": 0.05}),
            ]
        )
    ]

    def texts(request: dict[str, Any]) -> list[str]:
        return [choice["text"] for choice in live.complete(**request)["choices"]]

    alone = [texts(request) for request in requests]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(texts, requests))
    assert together == alone
    assert alone[1][0] != alone[1][1]
