"""Before anything is paid for: can the cluster ever hold what the config asks for, can every node use the storage?"""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mpo_ray.config import Actors, ConfigError, RunConfig
from mpo_ray.config_serving import Serve
from mpo_ray.run import Run
from mpo_ray.storage import RunError

Resources = Mapping[str, float]


class PlacementError(ValueError):
    """The cluster can never hold what the config asks for: without this check, Ray would wait for ever."""


def check_placement(config: RunConfig) -> None:
    """Compare every group of workers and actors with the cluster's nodes. Raises PlacementError."""
    nodes = node_shapes()
    total = cluster_limits(nodes)
    problems = [
        text for key, count, need in _demands(config) if (text := _shortage(key, count, need, nodes, total)) is not None
    ]
    if problems:
        raise PlacementError("\n".join(problems))


def check_serving(serve: Serve) -> None:
    """As `check_placement`, for the replicas that serving starts with."""
    need = {"CPU": serve.cpus_per_replica, "GPU": serve.gpus_per_replica}
    _check_group("serve.min_replicas", serve.min_replicas, need)


def check_actors(actors: Actors) -> None:
    """As `check_placement`, for actors that the command line asks for."""
    _check_group("--actors", actors.num_actors, {"CPU": actors.cpus_per_actor, "GPU": actors.gpus_per_actor})


def check_engine(engine: str, *, where: str) -> None:
    """Refuse an engine that is not installed. Raises ConfigError."""
    if engine == "vllm" and find_spec("vllm") is None:
        raise ConfigError(
            f"{where}: vllm is not installed here. Install it beside this package on every node, "
            "pip install 'mpo_ray[vllm]', or set engine: mpo."
        )


def _check_group(key: str, count: int, need: Resources) -> None:
    nodes = node_shapes()
    problem = _shortage(key, count, need, nodes, cluster_limits(nodes))
    if problem is not None:
        raise PlacementError(problem)


def node_shapes() -> list[Resources]:
    """Resources of every node that lives, and of every kind of node that the autoscaler may add."""
    shapes: list[Resources] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    config = ray._private.state.state.get_cluster_config()
    groups = () if config is None else config.node_group_configs
    return shapes + [dict(group.resources) for group in groups if group.max_count != 0]


def cluster_limits(nodes: list[Resources]) -> dict[str, float]:
    """The most of every resource the cluster can have: the autoscaler's limit where there is one, else what it has."""
    limits: dict[str, float] = dict(ray.cluster_resources())
    for kind, most in (ray._private.state.state.get_max_resources_from_cluster_config() or {}).items():
        limits[kind] = max(limits.get(kind, 0.0), float(most))
    return limits


def check_storage_everywhere(run: Run) -> None:
    """Have every node read what this process wrote into the run, and write what this process then reads.

    Raises RunError that names the first node which cannot.
    """
    token = uuid.uuid4().hex
    place = f".storage-check/{token}"  # of this check alone: another command may check at the same time
    run.write_text(f"{place}/driver", token)
    try:
        for node in (node for node in ray.nodes() if node["Alive"]):
            where = f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            probe = ray.remote(num_cpus=0)(_probe()).options(scheduling_strategy=there)
            problem = ray.get(probe.remote(pickle.dumps(run.filesystem), run.path(place), token))
            if problem is None and run.read_text(f"{place}/node") != token:
                problem = "what it wrote is not visible from the driver"
            if problem is not None:
                raise RunError(
                    f"node {where} cannot use the storage {run.root}: {problem}. Set `storage:` to a place that all "
                    "nodes share: a network file system, or a URL such as s3://bucket/path."
                )
            run.remove(f"{place}/node")
    finally:
        run.remove(place)
        run.remove_empty(".storage-check")


def _probe() -> Callable[[bytes, str, str], str | None]:
    """What a node does: read the driver's file, and write its own; returns what is wrong.

    A function within a function travels whole: the process there need not import this package, which takes seconds.
    """

    def probe(pickled: bytes, place: str, token: str) -> str | None:
        try:
            filesystem = pickle.loads(pickled)  # noqa: S301 - what the driver pickled
            if filesystem.cat_file(f"{place}/driver").decode() != token:
                return "the driver's file is not what it wrote"
            filesystem.pipe_file(f"{place}/node", token.encode())
        except FileNotFoundError:
            return "the driver's file is not visible there"
        except Exception as error:  # every kind of storage has its own
            return f"{type(error).__name__}: {error}"
        return None

    return probe


def _demands(config: RunConfig) -> list[tuple[str, int, dict[str, float]]]:
    """Place in the run file, how many at once, and what each needs."""
    trainings = {"policies.workers": config.policies.workers}
    if config.reference.sft is not None:
        trainings["reference.sft.workers"] = config.reference.sft.workers
    if config.mopo is not None:
        trainings["mopo.training.workers"] = config.mopo.training.workers
        own = {name: problem.training for name, problem in config.mopo.problems.items()}
        trainings |= {f"mopo.problems.{name}.training.workers": t.workers for name, t in own.items() if t is not None}
    demands: list[tuple[str, int, dict[str, float]]] = [
        (key, w.num_workers, {"CPU": w.cpus_per_worker, "GPU": w.gpus_per_worker}) for key, w in trainings.items()
    ]
    actors = config.scoring
    need = {"CPU": actors.cpus_per_actor, "GPU": actors.gpus_per_actor}
    return [*demands, ("scoring", actors.num_actors, need)]


def _shortage(
    key: str, count: int, need: Mapping[str, float], nodes: list[Resources], total: Mapping[str, float]
) -> str | None:
    wanted = {kind: amount for kind, amount in need.items() if amount > 0}
    each = _written(wanted)
    if not any(all(node.get(kind, 0.0) >= amount for kind, amount in wanted.items()) for node in nodes):
        largest = {kind: max((node.get(kind, 0.0) for node in nodes), default=0.0) for kind in wanted}
        return (
            f"{key}: each needs {each}, but no node has that; the most that one has is {_written(largest)}. Lower it, "
            "or add nodes."
        )
    for kind, amount in wanted.items():
        if count * amount > total.get(kind, 0.0) + 1e-9:
            return (
                f"{key}: {count} × {each} need {count * amount:g} {kind}, but the cluster can have "
                f"{total.get(kind, 0.0):g}. Lower the number, or add nodes."
            )
    return None


def _written(resources: Mapping[str, Any]) -> str:
    return " and ".join(f"{amount:g} {kind}" for kind, amount in resources.items())
