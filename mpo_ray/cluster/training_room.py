"""How many groups of workers train side by side: as many as there is room for, where that is worth their start."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import ray

from mpo_ray.cluster.progress import Report
from mpo_ray.config_training import Workers
from mpo_ray.training.pace import SECONDS_LEFT

#: Seconds of trainings that wait, from which on another group is started for them: its start takes some 20 s of a
#: processor, and of the clock.
WORTH_S = 60.0
#: How long the others wait, seconds, for a training of theirs to tell its pace.
PATIENCE_S = 30.0


class Outlook:
    """How long the trainings of one kind that wait would take, by what those at work say of their steps."""

    def __init__(self) -> None:
        self._each: float | None = None  # seconds of a training
        self._told: dict[str, int] = {}
        self._since: float | None = None

    def begin(self) -> None:
        """Some training is at work."""
        self._since = time.monotonic() if self._since is None else self._since

    def hear(self, told: Report) -> None:
        """Take a report of steps. The first one of a training says nothing of the pace: its first step is slower."""
        if told.task in self._told and self._told[told.task] < told.done < told.total:
            self._each = told.figures[SECONDS_LEFT] / (told.total - told.done) * told.total
        self._told[told.task] = told.done

    def is_worth(self, num_waiting: int) -> bool:
        """Whether another group should be started for so many trainings."""
        if self._each is not None:
            return num_waiting * self._each > WORTH_S
        return self._since is not None and time.monotonic() - self._since > PATIENCE_S


def num_side_by_side(workers: Workers) -> int:
    """How many groups of these workers the cluster holds at once, by the CPUs and GPUs that its nodes have."""
    return num_that_fit(workers, [node["Resources"] for node in ray.nodes() if node["Alive"]])


def num_free(workers: Workers, *, before: Iterable[Workers] = ()) -> int:
    """How many groups of these workers find their CPUs and GPUs free now.

    before: groups that start already, and may not have taken theirs
    """
    return num_that_fit(workers, ray._private.state.available_resources_per_node().values(), before=before)


def num_that_fit(workers: Workers, nodes: Iterable[Mapping[str, float]], *, before: Iterable[Workers] = ()) -> int:
    """How many groups of these workers find room on nodes with such resources, after others for which there is room.

    A worker takes what it needs from one node; the workers of a group may be on any nodes.
    """
    left = [dict(node) for node in nodes]
    for other in before:
        _place(other, left)
    num = 0
    while _place(workers, left):
        num += 1
    return num


def _place(workers: Workers, nodes: list[dict[str, float]]) -> bool:
    """Take what a group needs from the nodes; False, and nothing is taken, where there is no room for all of it."""
    need, taken = needs(workers), list[dict[str, float]]()
    for _ in range(workers.num_workers):
        fitting = (n for n in nodes if all(n.get(kind, 0.0) + 1e-9 >= amount for kind, amount in need.items()))
        node = next(fitting, None)
        if node is None:
            for other in taken:
                _add(other, need, 1)
            return False
        _add(node, need, -1)
        taken.append(node)
    return True


def _add(node: dict[str, float], need: Mapping[str, float], times: int) -> None:
    for kind, amount in need.items():
        node[kind] += times * amount


def needs(workers: Workers) -> dict[str, float]:
    """What each of these workers takes, by the kind of resource."""
    return {"CPU": workers.cpus_per_worker, **({"GPU": workers.gpus_per_worker} if workers.gpus_per_worker else {})}


def start_of(workers: Workers) -> str:
    """What a group waits for that has not said anything yet: resources, or the start of its workers."""
    wanted = needs(workers)
    groups = ray.util.placement_group_table().values()
    if not any(g["state"] == "PENDING" and wanted in map(dict, g["bundles"].values()) for g in groups):
        return "starting its worker" if workers.num_workers == 1 else f"starting its {workers.num_workers} workers"
    total, free = ray.cluster_resources(), ray.available_resources()
    need = [
        f"{amount * workers.num_workers:g} {kind} ({free.get(kind, 0.0):g} of {total.get(kind, 0.0):g} free)"
        for kind, amount in wanted.items()
    ]
    return f"waiting for {' and '.join(need)}"
