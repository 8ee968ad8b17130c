"""An S3 over HTTP on loopback, by moto's server, where it is installed in an environment of its own.

moto needs versions of packages that this project's other tools exclude; `make moto` installs it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs
import pytest

ROOT = Path(__file__).parents[1]
BUCKET = "bucket"


def moto_server() -> str:
    """The program; skips the test where there is none."""
    found = os.environ.get("MPO_RAY_MOTO_SERVER")
    own = ROOT / ".venv-moto" / "bin" / "moto_server"
    if found is None and not own.exists():
        pytest.skip("moto_server is not installed; run `make moto`, or set MPO_RAY_MOTO_SERVER")
    return found or str(own)


@contextmanager
def object_storage(environment: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket; the environment is such that pyarrow, Ray Train and processes find its server."""
    program = moto_server()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "of-a-test",
        "AWS_SECRET_ACCESS_KEY": "of-a-test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        environment.setenv(name, value)
    server = subprocess.Popen(
        [program, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait(port, server)
        address = f"127.0.0.1:{port}"
        pyarrow.fs.S3FileSystem(
            endpoint_override=address, scheme="http", allow_bucket_creation=True, region="us-east-1"
        ).create_dir(BUCKET)
        yield f"s3://{BUCKET}"
    finally:
        server.kill()
        server.wait()


def _wait(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert server.poll() is None, "moto_server ended"
            assert time.monotonic() < deadline, "moto_server does not answer"
            time.sleep(0.05)
