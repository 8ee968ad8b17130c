"""The page for people, in a real browser against a real endpoint."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import ExitStack, aclosing
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from mpo_ray.decoding.protocol import Delta, Diagnostics, EngineError, GenerationRequest
from mpo_ray.serving.endpoint import create_app
from mpo_ray.serving.page_files import PAGE_PATHS
from mpo_ray.serving.served import Served
from mpo_ray.serving.side_by_side import Batch, side_by_side
from tests.serving.browser import find_browser, headless
from tests.serving.live import NAME, PROMPT, SERVED, WEIGHTS, Live, serving
from tests.tiny import tiny_tokenizer

KEY = "a-key-for-tests"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
EVERYBODY = ["mixture", *WEIGHTS, "reference"]
PATIENCE_MS = 30_000  # a browser beside other tests; only what fails takes as long
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = find_browser()
    if executable is None:
        missing = "chromium is not installed; apt-get install chromium"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    with headless(executable) as here:
        yield here


class Tab:
    """A page that is looked at; it keeps what the browser complained of, and whom it asked."""

    def __init__(self, browser: Browser) -> None:
        self.context = browser.new_context()
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def ask(self, prompt: str, **options: str) -> None:
        """Fill in the form and press the button. options: by the id of the field"""
        self.page.fill("#prompt", prompt)
        for field, value in {"max-tokens": "12", **options}.items():
            self.page.fill(f"#{field}", value)
        self.page.click("#ask")

    def answered(self) -> dict[str, dict[str, str]]:
        """The parts of every answer by its model, once all have ended."""
        expect(self.page.locator(".answer")).not_to_have_count(0)
        expect(self.page.locator(".answer.running")).to_have_count(0)
        parts = ("prompt", "completion", "log-z", "tokens", "end", "error")
        found = {}
        for card in self.page.locator(".answer").all():
            name = card.locator("h2").text_content() or ""
            found[name] = {part: card.locator(f".{part}").text_content() or "" for part in parts}
        return found

    def set_weight(self, objective: str, tenths: int) -> None:
        """Move a slider by its keys, as a person can."""
        slider = self.page.get_by_label(objective, exact=True)
        slider.press("Home")
        for _ in range(tenths):
            slider.press("PageUp")


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    here = Tab(browser)
    here.page.set_default_timeout(PATIENCE_MS)
    yield here
    here.context.close()
    assert {re.match(r"http://127\.0\.0\.1:\d+/", url) is not None for url in here.asked} == {True}
    assert here.complaints == []


def shown(log_z: float) -> str:
    return f"{log_z:.3f}".replace("-0.000", "0.000").replace("-", "−")


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_every_model_answers_what_the_api_answers(tab: Tab, live: Live, kind: str) -> None:
    """Reference, policies and mixture at the sliders' weights, by the same seed; Σ log Z_t and tokens beside them."""
    tab.page.goto(live.url)
    expect(tab.page.locator("#sliders output")).to_have_text(["0.600", "0.400"])  # the endpoint's own
    tab.set_weight("helpful", 9)
    tab.set_weight("harmless", 3)
    expect(tab.page.locator("#sliders output")).to_have_text(["0.750", "0.250"])
    tab.page.select_option("#kind", kind)
    tab.ask(PROMPT, seed="7", temperature="0.9")
    found = tab.answered()
    assert list(found) == EVERYBODY
    for name, parts in found.items():
        body: dict[str, Any] = {"max_tokens": 12, "seed": 7, "temperature": 0.9}
        body["model"] = NAME if name == "mixture" else f"{NAME}/{name}"
        if name == "mixture":
            body["mixture"] = {"weights": {"helpful": 0.75, "harmless": 0.25}}
        asked = {"prompt": PROMPT} if kind == "completions" else {"messages": [{"role": "user", "content": PROMPT}]}
        path = "/v1/completions" if kind == "completions" else "/v1/chat/completions"
        answer = live.post(path, body | asked).json()
        choice = answer["choices"][0]
        assert parts == {
            "prompt": PROMPT if kind == "completions" else "",
            "completion": choice["text"] if kind == "completions" else choice["message"]["content"],
            "log-z": shown(choice["mixture"]["log_z"]),
            "tokens": str(answer["usage"]["completion_tokens"]),
            "end": "max tokens" if choice["finish_reason"] == "length" else "its end",
            "error": "",
        }
    assert len({parts["completion"] for parts in found.values()}) > 2
    assert float(found["mixture"]["log-z"].replace("−", "-")) < -0.1
    tab.page.click("#reset")
    expect(tab.page.locator("#sliders output")).to_have_text(["0.600", "0.400"])
    for width in (320, 390, 1280):
        tab.page.set_viewport_size({"width": width, "height": 800})
        assert tab.page.evaluate("document.documentElement.scrollWidth") == width


def test_all_weights_at_0_are_refused_before_anything_is_asked(tab: Tab, live: Live) -> None:
    tab.page.goto(live.url)
    for objective in WEIGHTS:
        tab.set_weight(objective, 0)
    expect(tab.page.locator("#status")).to_have_text("All weights are 0: give one objective some.")
    expect(tab.page.locator("#ask")).to_be_disabled()
    before = list(tab.asked)
    tab.page.fill("#prompt", PROMPT)
    tab.page.press("#prompt", "Control+Enter")
    assert tab.asked == before
    assert tab.page.locator(".answer").count() == 0
    tab.set_weight("harmless", 2)
    expect(tab.page.locator("#sliders output")).to_have_text(["0.000", "1.000"])
    expect(tab.page.locator("#ask")).to_be_enabled()


def test_errors_are_said_in_words(tab: Tab, live: Live) -> None:
    """No key, a wrong one, a refused request; the right key is used, and kept nowhere but in the field."""
    with serving(live.app(key_digests=(DIGEST,))) as url:
        tab.page.goto(url)
        status = tab.page.locator("#status")
        expect(status).to_have_text("This endpoint asks for an API key: enter yours.")
        tab.ask(PROMPT, key="wrong")
        expect(status).to_have_text("The API key is wrong.")
        tab.ask(PROMPT, key="schlüssel€")
        expect(status).to_have_text("The API key has a character that no key has.")
        tab.ask(PROMPT, key=KEY)
        assert all(parts["completion"] for parts in tab.answered().values())
        tab.ask(PROMPT, **{"max-tokens": "1000"})
        expect(status).to_have_text("max_tokens 1000 is above this endpoint's limit of 40.")
        expect(tab.page.locator(".answer")).to_have_count(0)  # once, and not once for each model
        tab.ask(PROMPT, key="wrong")
        expect(status).to_have_text("The API key is wrong.")
        kept = tab.page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, location.href]")
        assert kept == [0, 0, "", f"{url}/"]
    tab.ask(PROMPT)
    expect(status).to_have_text("The endpoint cannot be reached.")
    expect(tab.page.locator(".answer")).to_have_count(0)
    logged = ("Failed to load resource: the server responded with a status of 40", "Failed to load resource: net::ERR")
    assert all(line.startswith(logged) for line in tab.complaints), tab.complaints  # by the browser, not by the page
    tab.complaints.clear()


MARKUP = '<script>window.hurt = 1</script><img src="https://example.org/x" onerror="window.hurt = 1"> <b>the film</b>'


def test_prompts_answers_and_objectives_are_text(tab: Tab) -> None:
    """Markup in any of them is shown as it is written; nothing of it runs or loads."""
    objective = "<i>kind</i>"

    async def generate(requests: Sequence[GenerationRequest]) -> AsyncGenerator[Batch]:
        diagnostics = Diagnostics("token", {objective: 1.0}, log_z=0.0)
        yield [(0, Delta((9,), MARKUP, finish_reason="stop", diagnostics=diagnostics))]

    app = create_app(Served(MARKUP, (objective,), context=64, max_tokens=40), tiny_tokenizer(), generate)
    with serving(app) as url:
        tab.page.goto(url)
        expect(tab.page.locator("#model")).to_have_text(MARKUP)
        expect(tab.page.locator("#sliders output")).to_have_text(["1.000"])
        tab.page.select_option("#kind", "completions")
        tab.ask(MARKUP)
        found = tab.answered()
        assert list(found) == ["mixture", objective]
        assert {(parts["prompt"], parts["completion"]) for parts in found.values()} == {(MARKUP, MARKUP)}
        expect(tab.page.locator("main :is(script, img, b, i)")).to_have_count(0)
        assert tab.page.evaluate("window.hurt") is None


def test_an_error_in_the_middle_is_said_under_what_had_come(tab: Tab) -> None:
    async def generate(requests: Sequence[GenerationRequest]) -> AsyncGenerator[Batch]:
        if requests[0].sampling.max_tokens == 0:
            yield [(0, Delta(finish_reason="length", diagnostics=Diagnostics("token", {"kind": 1.0})))]
            return
        yield [(0, Delta((9,), "so far"))]
        raise EngineError("secret")

    with serving(create_app(Served("one", ("kind",), context=64, max_tokens=40), tiny_tokenizer(), generate)) as url:
        tab.page.goto(url)
        tab.ask(PROMPT)
        for parts in tab.answered().values():
            assert parts["completion"] == "so far"
            assert parts["error"].startswith("the engine could not go on with this request")


def test_answers_show_as_they_come_and_stop_when_told(tab: Tab, live: Live) -> None:
    """The mixture's completion is held after its first words; they are shown. Stop leaves them and frees the engine."""
    go_on = threading.Event()

    async def generate(requests: Sequence[GenerationRequest]) -> AsyncGenerator[Batch]:
        async with aclosing(side_by_side(live.engine, requests)) as batches:
            async for batch in batches:
                yield batch
                held = requests[0].weights == WEIGHTS and any(delta.text for _, delta in batch)
                while held and not go_on.is_set():
                    await asyncio.sleep(0.01)

    with serving(create_app(SERVED, live.tokenizer, generate)) as url, ExitStack() as stack:
        stack.callback(go_on.set)  # nothing may be held when the server ends
        tab.page.goto(url)
        expect(tab.page.locator("#sliders output")).to_have_count(len(WEIGHTS))
        tab.page.select_option("#kind", "completions")
        tab.ask(PROMPT, temperature="0", **{"max-tokens": "40"})
        expect(tab.page.locator(".answer.mixture.running .completion")).not_to_be_empty()
        whole = live.complete(max_tokens=40, temperature=0.0)["choices"][0]["text"]
        tab.page.click("#stop")
        stopped = tab.answered()["mixture"]
        assert stopped["end"] == "stop"
        assert whole.startswith(stopped["completion"])
        assert len(stopped["completion"]) < len(whole)
        go_on.set()
        tab.page.click("#ask")
        assert tab.answered()["mixture"]["completion"] == whole
    assert live.engine.statistics().kv_blocks_used == 0


@pytest.mark.parametrize("has_template", [True, False])
def test_a_model_with_a_chat_template_is_asked_as_a_chat(tab: Tab, has_template: bool) -> None:
    """By default; one without it cannot be."""

    async def generate(requests: Sequence[GenerationRequest]) -> AsyncGenerator[Batch]:
        yield [(0, Delta((9,), "yes", finish_reason="stop", diagnostics=Diagnostics("token", {"kind": 1.0})))]

    tokenizer = tiny_tokenizer(chat_template=has_template)
    with serving(create_app(Served("one", ("kind",), context=64, max_tokens=40), tokenizer, generate)) as url:
        tab.page.goto(url)
        expect(tab.page.locator("#sliders output")).to_have_count(1)
        expect(tab.page.locator("#kind")).to_have_value("chat" if has_template else "completions")
        tab.ask(PROMPT)
        assert {parts["completion"] for parts in tab.answered().values()} == {"yes"}
        assert any(url.endswith("v1/chat/completions") for url in tab.asked) == has_template


def test_the_page_scrolls_on_a_phone(tab: Tab, live: Live) -> None:
    """The answers come into view by themselves, the mixture's first, and a finger gets to every part of the page."""
    tab.page.set_viewport_size({"width": 375, "height": 667})
    tab.page.goto(live.url)
    expect(tab.page.locator("#sliders output")).to_have_count(len(WEIGHTS))
    assert tab.page.evaluate("scrollY") == 0
    tab.ask(PROMPT)
    tab.answered()
    expect(tab.page.locator(".answer").first.locator("h2")).to_have_text("mixture")
    expect(tab.page.locator(".answer").first).to_be_in_viewport(ratio=0.9)
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 375
    tab.page.mouse.move(180, 300)
    tab.page.mouse.wheel(0, 5000)
    expect(tab.page.locator("footer")).to_be_in_viewport()
    tab.page.mouse.wheel(0, -5000)
    expect(tab.page.locator("h1")).to_be_in_viewport()


def test_the_files_of_the_page_need_no_key_and_may_load_nothing_else(live: Live) -> None:
    """A strict policy on every file, no inline script or style, and every file it names is served."""
    app = live.app(key_digests=(DIGEST,), requests_per_minute=1)
    with serving(app) as url, httpx.Client(base_url=url) as client:
        found = {path: client.get(path) for path in PAGE_PATHS}
        assert client.get("/v1/models").status_code == 401
    for path, answer in found.items():
        assert answer.status_code == 200, path
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert {policy[f"{kind}-src"] for kind in ("script", "style", "connect", "img")} == {"'self'"}
        assert answer.headers["x-content-type-options"] == "nosniff"
    html = found["/"].text
    assert {f"/{name}" for name in re.findall(r'(?:src|href)="([^"]*)"', html)} < {*PAGE_PATHS}
    assert not re.search(r"<script(?![^>]*src=)|<style| style=| on\w+=", html)
