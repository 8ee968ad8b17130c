"""The mixture as a Ray Serve application: an ingress that speaks HTTP and admits, and replicas that decode."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve as ray_serve
from ray.exceptions import RayTaskError

from mpo_ray.cluster.preflight import check_engine, check_serving
from mpo_ray.cluster.session import end_by_signals, join_ray, start_local_ray
from mpo_ray.config import ConfigError
from mpo_ray.config_serving import Serve
from mpo_ray.config_training import Strict
from mpo_ray.policies.artefact import check_artefact
from mpo_ray.policies.mixture_config import MixtureConfig
from mpo_ray.serving.haproxy import PUBLIC_HOST, serves_by_haproxy
from mpo_ray.serving.ingress import Endpoint
from mpo_ray.serving.interface import artefact_digest
from mpo_ray.serving.ports import PortInUseError, check_port, free_port
from mpo_ray.serving.replica import Replica

#: Seconds in which a replica that has just started says what it holds.
DESCRIBED_WITHIN_S = 60.0
#: The last line of a traceback: the error's type, and what it says.
_ERROR = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception): (.+)$", re.MULTILINE)
#: Requests that the ingress has open at a time, at most; above it they are refused. How many are decoded or wait is
#: decided later: a request whose body has not come yet costs little, and must not keep others out.
OPEN_REQUESTS = 5000


class StartError(OSError):
    """Replicas did not start."""


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
    """The application that serves the artefact (a directory that every node sees) under the model id `name`.

    Raises ConfigError.
    """
    check_engine(serve.engine, where="serve.engine")
    artefact = str(Path(artefact).absolute())  # replicas have their own working directory
    digest, keys = artefact_digest(artefact), key_digests(serve)
    common = {
        "graceful_shutdown_timeout_s": serve.request_timeout_s,
        "health_check_period_s": serve.health_check_period_s,
        "health_check_timeout_s": serve.health_check_timeout_s,
        "max_surge_percent": 100,  # a new replica is there before an old one goes
    }
    replicas = ray_serve.deployment(
        Replica,
        name="MixtureReplica",
        ray_actor_options={"num_cpus": serve.cpus_per_replica, "num_gpus": serve.gpus_per_replica},
        autoscaling_config={
            "min_replicas": serve.min_replicas,
            "max_replicas": serve.max_replicas,
            "target_ongoing_requests": serve.target_ongoing_requests,
            "upscale_delay_s": serve.upscale_delay_s,
            "downscale_delay_s": serve.downscale_delay_s,
        },
        max_ongoing_requests=serve.ongoing_requests,
        max_queued_requests=serve.max_queued_requests,
        max_constructor_retry_count=1,  # what stops one replica stops the next: Serve would try for minutes
        **common,
    ).bind(artefact, digest, serve)
    return ray_serve.deployment(
        ray_serve.ingress()(Endpoint),
        name="Endpoint",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=OPEN_REQUESTS,
        **common,
    ).bind(replicas, artefact, digest, name, serve, keys)


def serve_endpoint(artefact: str, serve: Serve, name: str, *, blocking: bool) -> str:
    """Start the endpoint on `host:port` and return its URL; with `blocking`, serve until SIGINT or SIGTERM.

    Either of them before it serves ends it too, with KeyboardInterrupt.
    Port 0 takes a free port. Joins the Ray cluster that was initialised, else the one at RAY_ADDRESS, else starts one.
    Refuses a damaged artefact (ModelError), a port that is in use (ConfigError) and replicas that no node could hold
    (PlacementError) before it starts any.
    """
    check_artefact(Path(artefact), MixtureConfig.from_pretrained(artefact))
    particles = _particles_of_fit(Path(artefact))
    if particles > 1:
        print(
            f"warning: these weights were fitted for exact sampling with {particles} particles; requests are decoded "
            'token by token unless they say {"mixture": {"mode": "exact", "particles": '
            f"{particles}}}}}. The report compares both. Fit with decoding.particles: 1 for token mode.",
            file=sys.stderr,
        )
    check_open(serve)
    app = build_app(artefact, serve, name)
    own = not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")
    if own:
        _check_address(serve)
    port = serve.port or free_port(serve.host)
    host = serve.host
    if own and serves_by_haproxy():
        os.environ[PUBLIC_HOST] = serve.host  # HAProxy's; everything behind it stays on loopback
        host = "127.0.0.1"
    if blocking:
        end_by_signals()
    if own:
        start_local_ray()
    elif not ray.is_initialized():
        join_ray(os.environ["RAY_ADDRESS"])
    if blocking:
        end_by_signals()  # Ray puts handlers of its own in their place
    check_serving(serve)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its files have the rest
    try:
        ray_serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    except RayTaskError as error:
        if own:
            _check_address(serve)
        reason = str(error.cause or error).strip().splitlines()[-1]
        raise OSError(f"Ray Serve's HTTP server did not start: {reason}") from None
    url = f"http://{f'[{serve.host}]' if ':' in serve.host else serve.host}:{port}"
    if not blocking:
        _run(app, name, url, serve)
        return url
    try:
        _run(app, name, url, serve)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
    finally:
        ray_serve.delete(name)
        if not ray_serve.status().applications:  # on a shared cluster others may be served
            ray_serve.shutdown()
    return url


def _run(app: ray_serve.Application, name: str, url: str, serve: Serve) -> None:
    try:
        ray_serve.run(app, name=name, route_prefix="/")
    except RuntimeError as error:
        application = ray_serve.status().applications.get(name)
        told = [one.message for one in application.deployments.values()] if application else []
        raise StartError(f"{name} cannot be served: {_cause([str(error), *told])}") from None
    key = serve.api_keys_env or serve.api_key_env
    place = f"the API key is in {key}" if key else "no API key"
    replica = ray_serve.get_deployment_handle("MixtureReplica", name).describe.remote()
    print(f"A replica has {replica.result(timeout_s=DESCRIBED_WITHIN_S)}.")
    print(f"Serving {name} at {url}/v1 ({place}). Stop with Ctrl-C.", flush=True)


def _cause(messages: Sequence[str]) -> str:
    """What a replica's own error says, out of what Serve makes of it; all of it where there is none."""
    text = "\n".join(messages)
    found = _ERROR.findall(text)
    return found[-1].strip() if found else text.strip()


def _check_address(serve: Serve) -> None:
    """Raises ConfigError where nothing can listen at this host and port."""
    try:
        check_port(serve.host, serve.port)
    except PortInUseError:
        raise ConfigError(
            f"serve.port: another program listens at port {serve.port} of {serve.host}. Stop it, or choose another "
            "port with --port; 0 takes a free one."
        ) from None
    except OSError as error:
        raise ConfigError(f"serve.host: {serve.host} is no address of this machine ({error}).") from None


def _particles_of_fit(artefact: Path) -> int:
    """How many particles the decoded fit drew its completions with; 1 where another fit gave the weights."""
    path = artefact / "fit.json"
    fit = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return int((fit.get("decoded") or {}).get("particles", 1))


def key_digests(serve: Serve) -> tuple[str, ...]:
    """SHA-256 of each API key, so that no key enters the cluster's state or dashboard. Raises ConfigError."""
    keys: list[str] = []
    for place, variable in (("api_key_env", serve.api_key_env), ("api_keys_env", serve.api_keys_env)):
        if variable is None:
            continue
        found = os.environ.get(variable, "").replace(",", " ").split() if place == "api_keys_env" else []
        if place == "api_key_env" and os.environ.get(variable):
            found = [os.environ[variable].strip()]
        if not all(found) or not found:
            raise ConfigError(f"serve.{place}: the environment variable {variable} holds no key; set it.")
        keys += found
    return tuple(dict.fromkeys(hashlib.sha256(key.encode()).hexdigest() for key in keys))


def check_open(serve: Serve) -> None:
    """Refuse to listen beyond this machine for everybody, unless that is wanted. Raises ConfigError."""
    if _is_loopback(serve.host) or serve.api_key_env or serve.api_keys_env or serve.allow_open:
        return
    raise ConfigError(
        f"serve.host: {serve.host} can be reached from other machines, and no API key is asked for. Name the "
        "environment variable that holds the keys in serve.api_keys_env, or set serve.allow_open: true if something "
        "else keeps strangers out."
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
