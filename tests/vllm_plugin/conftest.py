"""One Ray cluster for all tests of vLLM that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
from ray import serve as ray_serve

from tests.vllm_plugin.mixtures import ENVIRONMENT


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """`ray.serve.llm` wants many logical CPUs; none of them works much."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=16,
            include_dashboard=False,
            object_store_memory=150 * 1024**2,
            log_to_driver=False,
        )
        yield
        ray_serve.shutdown()
        ray.shutdown()
