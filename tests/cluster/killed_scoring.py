"""A program for `test_killed_scoring.py`: score the samples of a run, on a local Ray, part by part."""

import sys
from typing import Any

from rich.console import Console

from mpo_ray.cluster.parts import Part, process_parts
from mpo_ray.cluster.score import SampleScorer
from mpo_ray.cluster.session import ray_session
from mpo_ray.config import Actors
from mpo_ray.run import Run
from tests.forked_workers import with_the_tests_workers

ACTORS = Actors(num_actors=1, batch_size=4)


def arguments(run: Run) -> dict[str, Any]:
    """What the scorer is made with."""
    return {
        "reference": str(run.local / "base"),
        "policies": {"a": str(run.local / "policies" / "a")},
        "rewards": {"a": f"{run.local}/slow.py:reward"},
        "beta": 0.5,
        "actors": ACTORS.model_dump(),
        "rendering": {},
    }


def main(root: str) -> None:
    run = Run.at(root)
    columns = {"log_ratio_a": "1", "reward_a": "2"}
    parts = [Part(node, node.replace("samples", "scores"), "all", columns=columns) for node in run.parts("samples")]
    with with_the_tests_workers(), ray_session():
        process_parts(
            run, parts, SampleScorer, arguments(run), actors=ACTORS, console=Console(stderr=True), title="scores"
        )


if __name__ == "__main__":
    main(sys.argv[1])
