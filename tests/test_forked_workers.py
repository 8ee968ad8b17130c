"""Workers of the tests' Ray: they have the libraries from the start, and the environment that Ray gives them."""

from __future__ import annotations

import os
import sys

import pytest
import ray

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Seen:
    """What a worker finds before it has imported anything for its work."""

    def loaded(self) -> bool:
        return "transformers" in sys.modules

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def parent(self) -> int:
        return os.getppid()


@pytest.mark.parametrize(("name", "loaded"), [("MPO_RAY_OF_A_TEST", True), ("PYTHON_OF_A_TEST", False)])
def test_a_worker_has_the_libraries_unless_its_environment_may_change_them(name: str, loaded: bool) -> None:
    """A variable of a runtime environment is there; one that an interpreter may read needs a new interpreter."""
    seen = ray.remote(Seen).options(runtime_env={"env_vars": {name: "set"}}).remote()
    assert ray.get([seen.loaded.remote(), seen.variable.remote(name)]) == [loaded, "set"]
    ray.kill(seen)


def test_workers_are_copies_of_one_process_with_variables_of_their_own() -> None:
    """Nothing of one worker's environment is in another's."""
    first = ray.remote(Seen).options(runtime_env={"env_vars": {"MPO_RAY_OF_A_TEST": "first"}}).remote()
    second = ray.remote(Seen).remote()
    assert ray.get(first.parent.remote()) == ray.get(second.parent.remote()) != os.getpid()
    assert ray.get(second.variable.remote("MPO_RAY_OF_A_TEST")) is None
    for worker in (first, second):
        ray.kill(worker)
