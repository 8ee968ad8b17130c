"""The ingress: everything that is not decoding. It speaks HTTP, makes token ids, and calls the replicas."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import grpc
from fastapi import FastAPI
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, RayServeException

from mpo_ray.config_serving import Serve
from mpo_ray.decoding.protocol import EngineError, GenerationRequest, QueueFullError
from mpo_ray.policies.loading import load_tokenizer
from mpo_ray.serving.endpoint import create_app
from mpo_ray.serving.interface import interface_of
from mpo_ray.serving.metrics import EndpointMetrics, Prometheus
from mpo_ray.serving.ray_metrics import RayInstruments
from mpo_ray.serving.served import Served
from mpo_ray.serving.side_by_side import Batch
from mpo_ray.serving.wire import OtherArtefactError, unpack

#: How a call ends whose replica is gone.
GONE = (RayActorError, RayServeException, grpc.RpcError)
#: Seconds between two asks for a replica's statistics, while no stream tells them.
ASK_EVERY = 2.0

logger = logging.getLogger(__name__)


class Endpoint:
    """Answers HTTP requests by calling `replicas`; each request's completions are made by one of them, in one call."""

    def __init__(self, replicas: Any, artefact: str, digest: str, name: str, serve: Serve, keys: Sequence[str]) -> None:
        interface = interface_of(artefact, serve.context, serve.engine)
        # Values are passed by gRPC and not as objects of Ray's store: a message costs a third
        self._replicas, self._interface = replicas.options(_by_reference=False), interface.digest
        self._retry_s = serve.retry_s
        self._shown = Prometheus()
        self._heard = 0.0
        self._asking: asyncio.Task[None] | None = None
        self._tokenizer = load_tokenizer(artefact)
        self._served = Served(
            name=name,
            objectives=interface.objectives,
            context=interface.context,
            max_tokens=serve.max_tokens,
            has_reference=interface.has_reference,
            exact_methods=interface.exact_methods,
            key_digests=tuple(keys),
            requests_per_minute=serve.requests_per_minute,
            allowed_origins=tuple(serve.allowed_origins),
            timeout_s=serve.request_timeout_s,
            max_body=serve.max_body_bytes,
            max_prompts=serve.max_prompts,
            max_n=serve.max_n,
            max_choices=serve.max_choices,
            max_prompt_tokens=serve.max_prompt_tokens,
            max_work=serve.max_work,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        observer = EndpointMetrics(self._shown, RayInstruments(engine=False))
        return create_app(self._served, self._tokenizer, self._generate, observer=observer, metrics=self._page)

    async def _generate(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[Batch]:
        """What a replica makes. One that goes before it has said anything is replaced by another, for a while.

        Raises QueueFullError where no replica has room and as many wait as may; EngineError where the replica went
        after its first word, or none could be found; and what the engine raises.
        """
        give_up, pause = time.monotonic() + self._retry_s, 0.05
        while True:
            heard = False
            try:
                async for batch in self._call(requests):
                    heard = True
                    yield batch
                return
            except BackPressureError:
                raise QueueFullError("no replica has room, and as many requests wait as may.") from None
            except (*GONE, OtherArtefactError) as error:
                logger.warning(
                    "a call was ended by %s, %s its first token", type(error).__name__, "after" if heard else "before"
                )
                if heard:
                    raise EngineError("the replica ended while it decoded.") from None
                if time.monotonic() + pause > give_up:
                    raise EngineError("no replica could be found.") from None
            await asyncio.sleep(pause)
            pause = min(2 * pause, 1.0)

    async def _call(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[Batch]:
        messages = self._replicas.options(stream=True).generate.remote(self._interface, list(requests))
        ended = False
        try:
            async for message in messages:
                batch, replica, statistics = unpack(message)
                self._heard = time.monotonic()
                self._shown.hear(replica, statistics)
                yield batch
            ended = True
        except Exception:
            ended = True
            raise
        finally:
            if not ended:
                messages.cancel()
            self._ask_on()

    def _page(self) -> tuple[bytes, str]:
        self._ask_on()
        return self._shown.page()

    def _ask_on(self) -> None:
        """Ask for statistics until a replica says that it does nothing: the last message of a stream does not."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._ask())

    async def _ask(self) -> None:
        while True:
            await asyncio.sleep(ASK_EVERY)
            if time.monotonic() - self._heard < ASK_EVERY:
                continue
            try:
                replica, statistics = await self._replicas.statistics.remote()
            except (*GONE, BackPressureError):
                continue
            self._shown.hear(replica, statistics)
            if not (statistics.running or statistics.waiting):
                return
