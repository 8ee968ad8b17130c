"""The mixture as a Ray Serve application: an ingress that speaks HTTP and admits, and replicas that decode."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import ValidationError
from ray import serve as ray_serve
from ray.serve.exceptions import BackPressureError

from mpo_ray.cluster.preflight import check_serving
from mpo_ray.config import ConfigError, Serve
from mpo_ray.config_training import Strict
from mpo_ray.decoding.engine_thread import EngineThread
from mpo_ray.decoding.open_engine import open_engine
from mpo_ray.decoding.protocol import GenerationRequest, Statistics
from mpo_ray.policies.artefact import check_artefact
from mpo_ray.policies.loading import load_tokenizer
from mpo_ray.policies.mixture_config import MixtureConfig
from mpo_ray.serving.endpoint import create_app
from mpo_ray.serving.errors import ApiError
from mpo_ray.serving.served import Served
from mpo_ray.serving.side_by_side import Batch, side_by_side

#: Seconds that a replica has, once told to stop, to finish what it decodes.
GRACE = 120.0


class _Replica:
    """The policies and their engine. `user_config: {"weights": {…}}` swaps the default weights."""

    def __init__(self, artefact: str, num_lanes: int) -> None:
        self._engine = EngineThread(open_engine(artefact, num_lanes=num_lanes))

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        unknown = sorted(set(user_config) - {"weights"})
        if unknown:
            raise ConfigError(f"user_config: unknown key {unknown[0]!r}; the known key is 'weights'.")
        if "weights" in user_config:
            self._engine.set_weights(user_config["weights"])

    async def generate(self, requests: Sequence[GenerationRequest]) -> AsyncIterator[Batch]:
        async with aclosing(side_by_side(self._engine, requests)) as batches:
            async for batch in batches:
                yield batch

    def statistics(self) -> Statistics:
        return self._engine.statistics()

    def check_health(self) -> None:
        self._engine.check_health()


@ray_serve.ingress()
class _Endpoint:
    """The ingress: everything that is not decoding. It refuses with 429 what the replicas cannot queue."""

    def __init__(self, replica: Any, artefact: str, name: str, max_tokens: int, key_digest: str | None) -> None:
        config = MixtureConfig.from_pretrained(artefact)
        self._replica = replica
        self._tokenizer = load_tokenizer(artefact)
        digests = () if key_digest is None else (key_digest,)
        self._served = Served(name, tuple(config.objectives), config.max_position_embeddings, max_tokens, digests)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._served, self._tokenizer, self._generate)

    async def _generate(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[Batch]:
        batches = self._replica.options(stream=True).generate.remote(list(requests))
        try:
            async for batch in batches:
                yield batch
        except BackPressureError:
            raise ApiError(429, "too many requests are waiting; try again later.", code="overloaded") from None
        except (asyncio.CancelledError, GeneratorExit):
            batches.cancel()
            raise


class BuildArguments(Strict):
    """`args` of `serve_apps.mixture:build` in a Serve config file, or `key=value` after `serve run`."""

    artefact: str
    name: str
    serve: Serve = Serve()


def build(args: Mapping[str, Any]) -> ray_serve.Application:
    """Application builder for `serve run` and `serve deploy`. Raises ConfigError."""
    try:
        arguments = BuildArguments.model_validate(dict(args))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ConfigError(f"serve application arguments: {problems}") from None
    return build_app(arguments.artefact, arguments.serve, arguments.name)


def build_app(artefact: str, serve: Serve, name: str) -> ray_serve.Application:
    """The application that serves the artefact (a directory that every node sees) under the model id `name`."""
    artefact = str(Path(artefact).absolute())  # replicas have their own working directory
    replica = ray_serve.deployment(
        _Replica,
        name="MixtureReplica",
        ray_actor_options={"num_cpus": serve.cpus_per_replica, "num_gpus": serve.gpus_per_replica},
        autoscaling_config={
            "min_replicas": serve.min_replicas,
            "max_replicas": serve.max_replicas,
            "target_ongoing_requests": serve.target_ongoing_requests,
        },
        max_ongoing_requests=max(1, round(2 * serve.target_ongoing_requests)),
        max_queued_requests=serve.max_queued_requests,
        graceful_shutdown_timeout_s=GRACE,
    ).bind(artefact, serve.num_lanes)
    return ray_serve.deployment(
        _Endpoint,
        name="Endpoint",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=GRACE,
    ).bind(replica, artefact, name, serve.max_tokens, _key_digest(serve.api_key_env))


def serve_endpoint(artefact: str, serve: Serve, name: str, *, blocking: bool) -> str:
    """Start the endpoint on `host:port` and return its URL; with `blocking`, serve until SIGINT or SIGTERM.

    Port 0 takes a free port. Joins the Ray cluster that was initialised, else the one at RAY_ADDRESS, else starts one.
    Refuses a damaged artefact (ModelError) and replicas that no node could hold (PlacementError) before it starts any.
    """
    check_artefact(Path(artefact), MixtureConfig.from_pretrained(artefact))
    particles = _particles_of_fit(Path(artefact))
    if particles > 1:
        print(
            f"caution: the weights were fitted for completions that are drawn with {particles} particles, and the "
            "endpoint decodes token by token; the report compares both. Fit with decoding.particles: 1 for it.",
            flush=True,
        )
    app = build_app(artefact, serve, name)
    if not ray.is_initialized():
        ray.init()
    check_serving(serve)
    port = serve.port or _free_port(serve.host)
    ray_serve.start(proxy_location="HeadOnly", http_options={"host": serve.host, "port": port})
    url = f"http://{serve.host}:{port}"
    ray_serve.run(app, name=name, route_prefix="/")
    print(f"Serving {name} at {url}/v1 (models: {url}/v1/models). Stop with Ctrl-C.", flush=True)
    if blocking:
        try:
            _wait_for_signal()
        finally:
            ray_serve.delete(name)
            if not ray_serve.status().applications:  # on a shared cluster others may be served
                ray_serve.shutdown()
    return url


def _particles_of_fit(artefact: Path) -> int:
    """How many particles the decoded fit drew its completions with; 1 where another fit gave the weights."""
    path = artefact / "fit.json"
    fit = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return int((fit.get("decoded") or {}).get("particles", 1))


def _wait_for_signal() -> None:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _key_digest(variable: str | None) -> str | None:
    """SHA-256 of the API key, so that the key itself never enters the cluster's state or dashboard."""
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"serve.api_key_env: the environment variable {variable} holds no key; set it.")
    return hashlib.sha256(key.encode()).hexdigest()
