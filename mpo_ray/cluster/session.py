"""Joining a Ray cluster, or starting one on this machine for the length of a command."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray._private import ray_constants

from mpo_ray.waiting import told_if_slow

LOCAL_OBJECT_STORE_BYTES = 256 * 2**20


@contextmanager
def ray_session(address: str | None = None) -> Iterator[None]:
    """Be connected to Ray while the block runs.

    A connection that exists is used and left alone. `address` (or RAY_ADDRESS, which `ray job submit` sets) joins a
    cluster; without one, a local Ray is started, and shut down at the end. SIGTERM in the block raises
    KeyboardInterrupt as Ctrl-C does, so that the end is the same.
    """
    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # the bars are ours
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    joined = address or os.environ.get("RAY_ADDRESS")
    end_by_signals()
    if joined:
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's Train page
        join_ray(joined)
    else:
        # Nobody takes this machine away: Ray Train needs no process that watches for that.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        start_local_ray(object_store_memory=LOCAL_OBJECT_STORE_BYTES)
    end_by_signals()  # Ray puts handlers of its own in their place, of which SIGTERM's aborts the process
    try:
        yield
    finally:
        ray.shutdown()


def end_by_signals() -> None:
    """Let SIGTERM be what Ctrl-C is, where this is the thread that gets signals."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)


def join_ray(address: str) -> None:
    """Connect to the Ray cluster at an address."""
    _init(f"joining Ray at {address}", address=address)


def _init(what: str, **options: Any) -> None:
    """`ray.init` without the line by which Ray's core says, on standard error, that it was told to be quiet.

    what: said on standard error if it takes long
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            with told_if_slow(what, lambda text: os.write(stderr, f"{text}\n".encode())):
                ray.init(log_to_driver=False, logging_level=logging.WARNING, **options)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            said.seek(0)
            os.write(2, b"".join(line for line in said if b"RAY_BACKEND_LOG_LEVEL" not in line))


def start_local_ray(**options: Any) -> None:
    """Start a Ray of this process's own, which nobody else can use. options: of `ray.init`

    All its servers listen on loopback, as they do where this machine's address is 127.0.0.1. Ray asks for a token there
    too, so that other users of the machine are kept out: a fresh one, which only the environment of Ray's processes
    holds. Variables that are set already stay: RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH.
    Raises OSError where Ray does not start in its time.
    """
    # Ray has one switch that keeps it off the network, meant for systems on which it forms no clusters. It is read when
    # Ray is imported, here from the environment of the processes that Ray starts.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    networked, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    logging.getLogger("ray._private.authentication").setLevel(
        logging.ERROR
    )  # it warns of the token that is wanted here
    try:
        _init("starting Ray", address="local", include_dashboard=False, **options)
    except Exception as error:
        if "timed out during startup" not in str(error):  # Ray raises no class of its own
            raise
        raise OSError("Ray did not start in 30 s. This machine may be too busy; try again.") from error
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = networked
        del os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]
