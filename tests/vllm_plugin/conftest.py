"""One Ray cluster for all tests of vLLM that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ray import serve as ray_serve

from tests.local_ray import local_ray
from tests.vllm_plugin.mixtures import ENVIRONMENT


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """`ray.serve.llm` wants many logical CPUs; none of them works much."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with local_ray(num_cpus=16):
            yield
            ray_serve.shutdown()
