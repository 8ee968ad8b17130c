"""Joining a Ray cluster, or starting one on this machine for the length of a command."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import torch

LOCAL_OBJECT_STORE_BYTES = 256 * 2**20


@contextmanager
def ray_session(address: str | None = None) -> Iterator[None]:
    """Be connected to Ray while the block runs.

    A connection that exists is used and left alone. `address` (or RAY_ADDRESS, which `ray job submit` sets) joins a
    cluster; without one, a local Ray is started, and shut down at the end.
    """
    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # the bars are ours
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    joined = address or os.environ.get("RAY_ADDRESS")
    if joined:
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's Train page
        ray.init(address=joined, log_to_driver=False, logging_level=logging.WARNING)
    else:
        ray.init(
            address="local",
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        ray.shutdown()
