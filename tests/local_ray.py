"""A Ray of its own for tests: no dashboard, little memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    """num_cpus: logical ones."""
    import ray  # after tests/conftest.py has set the environment

    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=150 * 1024**2,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
