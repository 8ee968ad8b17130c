"""Ray's workers for tests: copies of one process that has the libraries loaded, which takes most of a worker's start.

The tests start some hundred workers, and each would import PyTorch and transformers anew, for about five seconds of a
processor. Here Ray starts `tests/worker_start.py` in the place of its own script. That sends what it was
given to a process of this module, which forks: the copy becomes the worker, under the environment, the directory, the
arguments and the streams that Ray gave. Ray itself is not among the loaded libraries, because it reads its environment
when it is imported; nor is anything that makes a thread of Python's.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

#: Where the process that forks listens; `worker_start.py` reads it.
ADDRESS = "MPO_RAY_TEST_WORKERS"
ROOT = Path(__file__).parents[1]
#: What most workers import, but for what imports Ray.
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "pyarrow.compute",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "scipy.optimize",
    "fastapi",
    "uvicorn",
    "rich.progress",
    "mpo_ray.data.rendering",
    "mpo_ray.decoding.offline",
    "mpo_ray.decoding.open_engine",
    "mpo_ray.policies.ensemble",
    "mpo_ray.training.loop",
)


@contextlib.contextmanager
def forked_workers() -> Iterator[None]:
    """Every Ray that this process starts meanwhile has workers that are forked."""
    with tempfile.TemporaryDirectory(prefix="workers-") as directory, socket.socket(socket.AF_UNIX) as listener:
        address = f"{directory}/socket"
        listener.bind(address)
        listener.listen(64)
        command = [sys.executable, "-m", "tests.forked_workers", str(listener.fileno())]
        # To look for a GPU through CUDA would leave the copies without one.
        environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        with (
            subprocess.Popen(
                command, pass_fds=[listener.fileno()], stdin=subprocess.PIPE, env=environment, cwd=ROOT
            ) as forking,
            in_place_of_rays(address),
        ):
            listener.close()
            try:
                yield
            finally:
                forking.kill()


def with_the_tests_workers() -> contextlib.AbstractContextManager[None]:
    """The same in a program that a test has started, where the test has forked workers; else Ray's own."""
    address = os.environ.get(ADDRESS)
    return contextlib.nullcontext() if address is None else in_place_of_rays(address)


@contextlib.contextmanager
def in_place_of_rays(address: str) -> Iterator[None]:
    """Have the Rays that this process starts meanwhile ask for their workers at an address."""
    from ray._private import ray_constants

    script, ray_constants.SETUP_WORKER_FILENAME = (
        ray_constants.SETUP_WORKER_FILENAME,
        str(Path(__file__).with_name("worker_start.py")),
    )
    os.environ[ADDRESS] = address
    try:
        yield
    finally:
        ray_constants.SETUP_WORKER_FILENAME = script
        del os.environ[ADDRESS]


def wait(listener: socket.socket) -> None:
    """Until somebody asks for a worker. Ends the process where the tests are over."""
    ready, _, _ = select.select([listener, sys.stdin], [], [])
    if sys.stdin in ready:
        sys.exit()


def serve(listener: socket.socket) -> list[str]:
    """Fork for everyone who asks. Returns in the copies, each with the command line of its worker."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the copies
    while True:
        wait(listener)
        connection, _ = listener.accept()
        with connection:
            size, descriptors = _head(connection)
            given = connection.recv(size, socket.MSG_WAITALL)
            if os.fork():
                connection.sendall(b"+")
                for descriptor in descriptors:
                    os.close(descriptor)
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            # Open until this process ends, which is how its asker knows of that; not handed on to its children.
            os.set_inheritable(connection.detach(), False)
        listener.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        arguments, environment, directory = json.loads(given)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        return list(arguments)


def _head(connection: socket.socket) -> tuple[int, array.array[int]]:
    """The number of bytes that follow, and the streams that came with it."""
    size, messages, *_ = connection.recvmsg(8, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    descriptors = array.array("i")
    for _, _, content in messages:
        descriptors.frombytes(content)
    return int.from_bytes(size, "big"), descriptors


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    wait(listener)  # Ray has 30 s for its own start, of which nothing is to be taken
    for name in LIBRARIES:
        importlib.import_module(name)
    assert "ray" not in sys.modules
    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()
    sys.argv = serve(listener)
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
