"""A Ray that a command starts for itself: nobody else can reach it, or use it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import psutil
import pytest

LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
#: Starts Ray with a worker, says its token, and ends when its input does.
START = """
import os, sys
from mpo_ray.cluster.session import ray_session

with ray_session():
    import ray
    ray.get(ray.remote(lambda: None).remote())
    print(os.environ.get("RAY_AUTH_TOKEN"), flush=True)
    try:
        sys.stdin.read()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def sockets(tree: list[psutil.Process]) -> set[tuple[str, int, str]]:
    """Address, port and process of everything that listens."""
    return {
        (each.laddr.ip, each.laddr.port, one.name())
        for one in tree
        for each in one.net_connections()
        if each.status == psutil.CONN_LISTEN
    }


@pytest.mark.slow
def test_sigterm_is_what_ctrl_c_is() -> None:
    """Ray's own handler would abort the process with a stack, as `ray job stop` and orchestrators would see."""
    started = subprocess.Popen(
        [sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    started.stdout.readline()
    tree = psutil.Process(started.pid).children(recursive=True)
    started.send_signal(signal.SIGTERM)
    said, told = started.communicate(timeout=60)
    assert (started.returncode, said) == (0, "interrupted\n"), told
    assert not psutil.wait_procs(tree, timeout=30)[1]


@pytest.mark.slow
def test_a_ray_of_its_own_listens_on_loopback_and_asks_for_a_token_that_nothing_shows(tmp_path: Path) -> None:
    """On a machine with a network, Ray's servers listen on all its interfaces by default."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    started = subprocess.Popen(
        [sys.executable, "-c", START],
        env=environment | {"HOME": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    token = started.stdout.readline().strip()
    assert len(token) == 64, started.communicate()
    tree = [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]
    listening = sockets(tree)
    assert {"gcs_server", "raylet"} <= {name for _, _, name in listening}
    assert not [each for each in listening if each[0] not in LOOPBACK]
    assert not [one for one in tree if token in " ".join(one.cmdline())]
    assert not (tmp_path / ".ray").exists()  # where Ray keeps a token that other users of the machine may read
    core = [port for _, port, name in listening if name == "gcs_server"]
    with grpc.insecure_channel(f"127.0.0.1:{core[0]}") as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
        with pytest.raises(grpc.RpcError) as refused:
            ask(b"", timeout=20)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        ask(b"", timeout=20, metadata=[("authorization", f"Bearer {token}")])
    _, told = started.communicate("", timeout=60)
    assert started.returncode == 0
    assert "authentication" not in told


@pytest.mark.slow
def test_a_start_that_takes_long_is_told_while_it_lasts() -> None:
    """On standard error, which is Ray's own at that time. What takes no time is not told."""
    code = "from mpo_ray import waiting\nwaiting.SLOW_S = {slow}\nfrom mpo_ray.cluster.session import ray_session\n"
    for slow, told in ((0.01, 1), (600.0, 0)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(slow=slow) + "with ray_session():\n    pass"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines().count("starting Ray") == told, done.stderr
