"""A program for `test_two_nodes.py`: start a cluster of two nodes, train on it, and print what happened as JSON."""

import json
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from mpo_ray.cluster.preflight import PlacementError, check_placement, check_storage_everywhere
from mpo_ray.cluster.train import TrainingError
from mpo_ray.config import RunConfig
from mpo_ray.run import Run
from mpo_ray.run_file import load_config
from mpo_ray.stages.pipeline import run_single
from mpo_ray.stages.stage import Context
from mpo_ray.stages.training import train_policies
from tests.forked_workers import with_the_tests_workers
from tests.tiny_run import CONFIG, overrides

TWO_WORKERS = (
    "reference.sft=null",
    "policies.workers={num_workers: 2, cpus_per_worker: 1, max_failures: 0}",
    "policies.micro_batch_size=16",
    "policies.zero_stage=2",
    "policies.checkpoint_every=100",
)


def main(storage: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    config = load_config(CONFIG, [*overrides(storage, "two"), *TWO_WORKERS])
    run = Run.open(config)
    check_placement(config)
    check_storage_everywhere(run)
    run_single(Context(config, run, Console(stderr=True)), "embedded", "data", "pairs")

    _train(run, config, "concise")
    _train(
        run, config, "detailed", lora=None, loss="ipo", zero_stage=3, learning_rate=1e-4, gradient_checkpointing=True
    )
    [checkpoint] = run.local.glob("training/concise-*/checkpoint_*")
    victim = checkpoint / "state" / "mp_rank_00_model_states.pt"
    victim.write_bytes(victim.read_bytes()[:100])
    damaged = None
    finished, aside = run.local / "policies" / "concise", run.local / "finished"
    finished.rename(aside)  # a policy that is there would be kept
    try:
        _train(run, config, "concise")
    except TrainingError as error:
        damaged = str(error)
    aside.rename(finished)

    seen = {
        "nodes": len(ray.nodes()),
        "damaged": damaged,
        "too_many": _refusal(storage, "policies.workers={num_workers: 4}", "policies.micro_batch_size=8"),
        "too_large": _refusal(storage, "policies.workers={cpus_per_worker: 2}"),
        "no_gpu": _refusal(storage, "scoring.gpus_per_actor=1"),
    }
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(seen))


def _train(run: Run, config: RunConfig, objective: str, **changes: object) -> None:
    """Train one policy of the run, with other settings."""
    policies = config.policies.model_copy(update=changes)
    one = config.model_copy(update={"objectives": {objective: config.objectives[objective]}, "policies": policies})
    train_policies(Context(one, run, Console(stderr=True)))


def _refusal(storage: Path, *changes: str) -> str | None:
    try:
        check_placement(load_config(CONFIG, [*overrides(storage, "two"), *changes]))
    except PlacementError as error:
        return str(error)
    return None


if __name__ == "__main__":
    with with_the_tests_workers():
        main(Path(sys.argv[1]))
