"""Artefacts and an application on a real Serve instance, for the tests of `service`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo_ray.policies.artefact import write_artefact
from tests.serving.live import WEIGHTS
from tests.tiny import tiny_llama, tiny_lora, tiny_tokenizer


def write_mixture(root: Path, *, seed: int = 1, weights: Mapping[str, float] = WEIGHTS, context: int = 64) -> Path:
    """An artefact of two random adapters on one base; another seed gives other adapters on the same base."""
    reference = root / "reference"
    if not reference.is_dir():
        tiny_llama(reference, tiny_tokenizer(), seed=0, max_position_embeddings=context)
    policies = {name: tiny_lora(root / f"{name}{seed}", reference, seed + k) for k, name in enumerate(WEIGHTS)}
    target = root / f"mixture{seed}"
    write_artefact(target, objectives=policies, reference=reference, copy_reference=True, weights=weights, fit={})
    return target


def generated(artefact: Path, prompt: str, weights: dict[str, float] | None = None, num_tokens: int = 12) -> str:
    """Greedy text by the artefact's own `generate`: behind a prompt that is text; of a rendered chat, the reply."""
    model = AutoModelForCausalLM.from_pretrained(artefact, **({} if weights is None else {"weights": weights}))
    tokenizer = AutoTokenizer.from_pretrained(artefact)
    is_chat = prompt.startswith("<s>")
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not is_chat).input_ids
    whole = model.generate(ids, max_new_tokens=num_tokens, do_sample=False)[0]
    if is_chat:
        return str(tokenizer.decode(whole[ids.shape[1] :], skip_special_tokens=True))
    return str(tokenizer.decode(whole, skip_special_tokens=True)).removeprefix(prompt)


class Load:
    """Users who ask one after the other until they are told to stop; every answer's status and body is kept."""

    def __init__(self, url: str, num_users: int, body: Mapping[str, Any]) -> None:
        self._url, self._num_users, self._body = url, num_users, dict(body)
        self._stop = asyncio.Event()
        self.answers: list[tuple[int, Any]] = []

    async def during(self, work: Callable[[], Awaitable[None]]) -> None:
        """Ask while `work` lasts."""
        async with httpx.AsyncClient(timeout=60) as client:
            users = [asyncio.create_task(self._ask(client)) for _ in range(self._num_users)]
            try:
                await asyncio.sleep(0.5)
                await work()
                await asyncio.sleep(0.5)
            finally:
                self._stop.set()
                await asyncio.gather(*users)

    async def _ask(self, client: httpx.AsyncClient) -> None:
        while not self._stop.is_set():
            answer = await client.post(f"{self._url}/v1/completions", json=self._body)
            self.answers.append((answer.status_code, answer.json()))
