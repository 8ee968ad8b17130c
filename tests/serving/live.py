"""A real tiny mixture behind a real server on loopback, for tests; and a tokenizer whose tokens are bytes."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mpo_ray.decoding.engine_thread import EngineThread
from mpo_ray.decoding.open_engine import open_engine
from mpo_ray.decoding.protocol import GenerationRequest
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.loading import load_tokenizer
from mpo_ray.serving.endpoint import create_app
from mpo_ray.serving.observer import Observer
from mpo_ray.serving.served import Served
from mpo_ray.serving.side_by_side import Batch, side_by_side
from tests.tiny import tiny_llama, tiny_lora, tiny_tokenizer

NAME = "tiny"
WEIGHTS = {"helpful": 0.6, "harmless": 0.4}
PROMPT = "the film was"
SERVED = Served(NAME, tuple(WEIGHTS), context=64, max_tokens=40, has_reference=True)
#: vLLM's attention on a CPU wants heads of 32.
SIZES: dict[str, dict[str, int]] = {
    "mpo": {},
    "vllm": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
}
#: A template with control tokens of its own, as real ones have.
BYTE_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, one for é, one for the first two bytes of €: characters are cut in several ways."""
    vocabulary = {character: id for id, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pairs = [("Ã", "©"), ("â", "Ĥ")]
    for one, other in pairs:
        vocabulary[one + other] = len(vocabulary)
    core = Tokenizer(models.BPE(vocabulary, pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>", "<s>", "</s>")])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = BYTE_TEMPLATE
    return tokenizer


def write_tiny(root: Path, tokenizer: PreTrainedTokenizerFast | None = None, engine: str = "mpo") -> Path:
    """A mixture of two adapters, as an artefact that this engine can open."""
    reference = tiny_llama(root / "reference", tokenizer or tiny_tokenizer(), seed=0, **SIZES[engine])
    write_artefact(
        root / "mixture",
        objectives={name: tiny_lora(root / name, reference, seed) for seed, name in enumerate(WEIGHTS, start=1)},
        reference=reference,
        copy_reference=True,
        weights=WEIGHTS,
        fit={},
    )
    return root / "mixture"


class Live:
    """An engine, its endpoint, and where both are."""

    def __init__(self, artefact: Path, engine: Any, served: Served = SERVED) -> None:
        self.artefact, self.engine, self.served = artefact, engine, served
        self.tokenizer: Any = load_tokenizer(str(artefact))
        self.url = ""
        self.http = httpx.Client()

    def app(self, *, observer: Observer | None = None, **limits: Any) -> FastAPI:
        """An endpoint on this engine. limits: fields of `Served` to change"""

        async def check_health() -> None:
            self.engine.check_health()

        return create_app(
            replace(self.served, **limits),
            self.tokenizer,
            self.generate,
            observer=observer,
            metrics=lambda: (b"tiny_requests_total 1\n", "text/plain; version=0.0.4"),
            check_health=check_health,
        )

    def generate(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[Batch]:
        return side_by_side(self.engine, requests)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def complete(self, **fields: Any) -> dict[str, Any]:
        """The body of a completion that has to succeed."""
        answer = self.post("/v1/completions", {"model": NAME, "prompt": PROMPT, **fields})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The chunks of a stream that has to succeed."""
        answer = self.post(path, {"model": NAME, **body, "stream": True})
        assert answer.status_code == 200, answer.text
        return chunks_of(answer.text)


def chunks_of(text: str) -> list[dict[str, Any]]:
    """Of a stream that came to its end."""
    *events, done = events_of(text)
    assert done == "[DONE]", done
    return [json.loads(event) for event in events]


def events_of(text: str) -> list[str]:
    """The data of server-sent events."""
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    return [event.removeprefix("data: ") for event in events]


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an ASGI app on a free port of loopback, in a thread; gives its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", access_log=False))
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def running(artefact: Path, engine: str = "mpo") -> Iterator[Live]:
    """An engine of 16 lanes behind an endpoint."""
    if engine == "vllm":
        from mpo_ray.vllm_plugin.engine import VllmEngine

        served = replace(SERVED, has_reference=False, exact_methods=("rejection",))
        live = Live(artefact, VllmEngine(str(artefact), max_num_seqs=16), served)
    else:
        live = Live(artefact, EngineThread(open_engine(str(artefact), max_num_seqs=16)))
    try:
        with serving(live.app()) as live.url, httpx.Client(base_url=live.url, timeout=60) as live.http:
            yield live
    finally:
        live.engine.close()


def ask(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    """One request to an app in this process."""

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())
