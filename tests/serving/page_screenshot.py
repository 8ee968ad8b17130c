"""A picture of the page: `python -m tests.serving.page_screenshot ARTEFACT PICTURE [PROMPT]`."""

from __future__ import annotations

import sys

from playwright.sync_api import expect

from mpo_ray.decoding.engine_thread import EngineThread
from mpo_ray.decoding.open_engine import open_engine
from mpo_ray.policies.loading import load_tokenizer
from mpo_ray.serving.endpoint import create_app
from mpo_ray.serving.served import Served
from mpo_ray.serving.side_by_side import side_by_side
from tests.serving.browser import find_browser, headless
from tests.serving.live import serving

PROMPT = "I watched this film with my family and"


def photograph(artefact: str, picture: str, prompt: str = PROMPT) -> None:
    """Serve a mixture of LoRA policies, let everything on the page answer the prompt, and take a picture of it."""
    executable = find_browser()
    if executable is None:
        raise SystemExit("chromium is not installed; apt-get install chromium")
    engine = EngineThread(open_engine(artefact, max_num_seqs=8))
    served = Served("imdb", engine.objectives, context=256, max_tokens=200, has_reference=True)
    app = create_app(served, load_tokenizer(artefact), lambda requests: side_by_side(engine, requests))
    try:
        with serving(app) as url, headless(executable) as browser:
            page = browser.new_page(viewport={"width": 1280, "height": 720}, device_scale_factor=1.25)
            page.goto(url)
            page.fill("#prompt", prompt)
            page.fill("#temperature", "0.6")
            expect(page.locator("#sliders input")).not_to_have_count(0)
            page.click("#ask")
            expect(page.locator(".answer")).not_to_have_count(0)
            expect(page.locator(".answer.running")).to_have_count(0, timeout=120_000)
            page.screenshot(path=picture, full_page=True)
    finally:
        engine.close()


if __name__ == "__main__":
    photograph(*sys.argv[1:])
