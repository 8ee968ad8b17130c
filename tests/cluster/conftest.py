"""What tests of a training worker share: the process group that Ray Train would have made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(scope="package")
def gloo_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A gloo group of one. DeepSpeed keeps the first group that it sees, so there is one for all modules."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def process_group(gloo_group: None) -> Iterator[None]:
    """The group, and what a launcher would have set, for the tests of one module."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LOCAL_RANK", "0")
        yield
