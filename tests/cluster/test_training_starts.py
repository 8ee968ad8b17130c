"""Which group does which training, how many groups start, and what happens where one cannot, or the driver stops."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.util.placement_group import placement_group, remove_placement_group
from rich.console import Console

from mpo_ray.cluster import train, training_board, training_group, training_kind, training_room
from mpo_ray.cluster.progress import Report
from mpo_ray.cluster.train import TrainingError, train_all
from mpo_ray.cluster.training_board import News, Reporter, TrainingBoard, ask, news_of, put_up
from mpo_ray.cluster.training_group import Group
from mpo_ray.cluster.training_job import TrainingJob
from mpo_ray.cluster.training_kind import MOST_STARTS, Kind
from mpo_ray.cluster.training_room import WORTH_S, Outlook, num_that_fit
from mpo_ray.config_training import Workers
from tests.cluster.small_trainings import small_job, small_run

# ---- the board -------------------------------------------------------------------------------------------------------


def test_a_group_keeps_its_training_until_that_has_ended_and_takes_only_its_own_kind() -> None:
    board = TrainingBoard({0: ["a", "b"], 1: ["c"]})
    assert [board.take(0, 0), board.take(1, 0), board.take(0, 0), board.take(2, 0)] == ["a", "b", "a", None]
    assert (board.has_work(0, 0), board.has_work(2, 0), board.has_work(2, 1)) == (True, False, True)
    board.end(0, "a", "why")
    assert board.take(0, 0) is None
    board.report("b", 1, 2, {})
    for _ in range(2):
        board.remark("b", "look")
    assert board.news() == ([("b", 1, 2, {})], [("b", "look")], [("a", "why")], {1: "b"})
    assert board.news() == ([], [("b", "look")], [("a", "why")], {1: "b"})


def test_looking_up_what_a_group_is_at_takes_nothing() -> None:
    board = TrainingBoard({0: ["a"]})
    assert board.at(0) is None
    assert board.take(1, 0) == "a"
    assert (board.at(0), board.at(1)) == (None, "a")


def test_only_trainings_that_wait_are_given_up() -> None:
    board = TrainingBoard({0: ["a", "b", "c"], 1: ["d"]})
    board.take(0, 0)
    board.give_up(0, {"a": "no room", "b": "no room", "d": "no room"})
    assert board.news()[2:] == ([("b", "no room")], {0: "a"})
    assert (board.take(1, 0), board.take(2, 1)) == ("c", "d")


def test_a_board_that_is_out_of_reach_for_a_moment_is_asked_again_and_nothing_is_done_twice(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every first answer is lost on its way: the board has done what it was asked."""
    monkeypatch.setattr(training_board, "PAUSE_S", 0.01)
    board, get, num_calls = put_up({0: ["a", "b", "c"]}), ray.get, 0

    def lossy(ref: Any, **named: Any) -> Any:
        nonlocal num_calls
        answer, num_calls = get(ref, **named), num_calls + 1
        if num_calls % 2:
            raise ActorUnavailableError("the network is down", None)
        return answer

    monkeypatch.setattr(ray, "get", lossy)
    taken = []
    while (name := ask(board, "take", 0, 0)) is not None:
        taken.append(name)
        ask(board, "end", 0, name, None)
    assert taken == ["a", "b", "c"]
    assert news_of(board) == News([], [], [("a", None), ("b", None), ("c", None)], {})
    monkeypatch.setattr(training_board, "UNREACHABLE_S", -1.0)
    with pytest.raises(ActorUnavailableError):
        ask(board, "at", 0)
    ray.kill(board)


def test_a_worker_finds_at_a_later_report_that_the_board_has_died(ray_cluster: None) -> None:
    board = put_up({0: ["a"]})
    reporter = Reporter(board, "a")
    reporter.note("opening the model")
    reporter.steps(1, 3, loss=0.5)
    assert news_of(board).reports == [Report("a", 0, 0, {}, "opening the model"), Report("a", 1, 3, {"loss": 0.5})]
    ray.kill(board)

    def is_alone() -> bool:
        try:
            reporter.steps(2, 3)
        except RayActorError:
            return True
        return False

    _wait_until(is_alone)


# ---- room ------------------------------------------------------------------------------------------------------------


def test_groups_fit_by_what_each_of_their_workers_takes_from_one_node() -> None:
    workers = Workers(num_workers=2, cpus_per_worker=1.5, gpus_per_worker=0.5)
    assert num_that_fit(workers, [{"CPU": 9.0, "GPU": 4.0}]) == 3
    assert num_that_fit(workers, [{"CPU": 9.0, "GPU": 1.0}]) == 1
    assert num_that_fit(workers, [{"CPU": 9.0}]) == 0
    assert num_that_fit(workers, [{"CPU": 1.5, "GPU": 1.0}, {"CPU": 1.5, "GPU": 1.0}]) == 1
    large = Workers(cpus_per_worker=4)
    assert num_that_fit(large, [{"CPU": 2.0}, {"CPU": 2.0}]) == 0
    assert num_that_fit(large, [{"CPU": 2.0}, {"CPU": 9.0}, {"CPU": 7.0}]) == 3


def test_groups_that_start_have_their_room_first_unless_there_is_none_for_them() -> None:
    one, two = Workers(), Workers(num_workers=2)
    nodes = [{"CPU": 2.0}, {"CPU": 1.0}]
    assert num_that_fit(one, nodes, before=[two]) == 1
    assert num_that_fit(one, nodes, before=[Workers(cpus_per_worker=4)]) == 3


def test_free_room_is_what_nodes_have_left(ray_cluster: None) -> None:
    half = Workers(cpus_per_worker=ray.cluster_resources()["CPU"] / 2)
    assert training_room.num_side_by_side(half) == 2
    held = placement_group([{"CPU": 1}])
    ray.get(held.ready())
    _wait_until(lambda: training_room.num_free(half) == 1)
    assert training_room.num_side_by_side(half) == 2
    remove_placement_group(held)
    _wait_until(lambda: training_room.num_free(half) == 2)


def test_another_group_is_worth_its_start_where_what_waits_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pace of the second report: the first step is slower. Without a pace, others do not wait for ever."""
    outlook = Outlook()
    outlook.begin()
    outlook.hear(Report("a", 1, 10, {"seconds_left": 9 * WORTH_S}))
    assert not outlook.is_worth(5)
    outlook.hear(Report("a", 5, 10, {"seconds_left": WORTH_S / 4 + 1}))
    assert (outlook.is_worth(1), outlook.is_worth(2)) == (False, True)
    outlook.hear(Report("a", 10, 10, {"seconds_left": 0.0}))
    assert outlook.is_worth(2)
    silent = Outlook()
    monkeypatch.setattr(training_room, "PATIENCE_S", -1.0)
    assert not silent.is_worth(5)
    silent.begin()
    assert silent.is_worth(1)


# ---- groups that cannot start ----------------------------------------------------------------------------------------


def _jobs(root: Path, *names: str, **workers: object) -> list[TrainingJob]:
    (root / "config.yaml").write_text("{}")
    settings = {"micro_batch_size": 2, "workers": {"max_failures": 0, **workers}}
    return [small_job(root, name, **settings) for name in names]


def _does_all(group: Group) -> None:
    while (name := ask(group.board, "take", group.number, group.kind)) is not None:
        ask(group.board, "end", group.number, name, None)


def _wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_failure_between_two_trainings_is_charged_to_none(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each group but the last ends with an error when one training is done and the next was not taken."""
    seen: list[tuple[int, str]] = []

    def fit(group: Group) -> Exception | None:
        name = ask(group.board, "take", group.number, group.kind)
        seen.append((group.number, name))
        ask(group.board, "end", group.number, name, None)
        return RuntimeError("the node went away")

    monkeypatch.setattr(training_group, "fit", fit)
    train_all(_jobs(tmp_path, "a", "b", "c", "d"), Console())
    assert [name for _, name in seen] == ["a", "b", "c", "d"]


def test_the_only_group_is_tried_again_and_what_waits_is_given_up_in_the_end(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tries in a row alone count: the first training is done between some that fail. Other kinds go on."""
    starts: list[int] = []

    def fit(group: Group) -> Exception | None:
        if group.workers.num_workers == 2:
            _does_all(group)
            return None
        starts.append(group.number)
        if len(starts) == MOST_STARTS:
            assert ask(group.board, "take", group.number, group.kind) == "a"
            time.sleep(2 * train.POLL_S)
            ask(group.board, "end", group.number, "a", None)
        return RuntimeError("the node\nhas no such GPU")

    monkeypatch.setattr(training_group, "fit", fit)
    with pytest.raises(TrainingError) as raised:
        train_all([*_jobs(tmp_path, "a", "b", "c"), *_jobs(tmp_path, "d", num_workers=2)], Console())
    first, *causes = str(raised.value).splitlines()
    assert "training ended early" in first
    for name, cause in zip("bc", causes, strict=True):
        told = (
            rf"  {name}: its workers ended {MOST_STARTS} times before they were at a training: has no such GPU \(all "
        )
        assert re.match(told, cause), cause
        assert next(tmp_path.glob(f"training/{name}-*/error.txt")).read_text() == "the node\nhas no such GPU"
    assert len(starts) == 2 * MOST_STARTS


def test_a_group_that_cannot_start_beside_another_ends_and_leaves_all_to_that(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two for two trainings that wait. They take no training with them, and no further group is tried at once."""
    by_number: dict[int, list[str]] = {}

    def fit(group: Group) -> Exception | None:
        done = by_number.setdefault(group.number, [])
        if group.number:
            return RuntimeError("a tenant was faster")
        while (name := ask(group.board, "take", group.number, group.kind)) is not None:
            _wait_until(lambda: 2 in by_number)
            time.sleep(2 * train.POLL_S)
            ask(group.board, "end", group.number, name, None)
            done.append(name)
        return None

    monkeypatch.setattr(training_group, "fit", fit)
    monkeypatch.setattr(training_room, "PATIENCE_S", -1.0)
    train_all(_jobs(tmp_path, "a", "b", "c"), Console())
    assert by_number == {0: ["a", "b", "c"], 1: [], 2: []}


def test_a_kind_that_waits_for_its_resources_does_not_hold_back_another(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first kind never starts, while the second has as many groups as it has room for."""
    never = Kind(0, {job.name: job for job in _jobs(tmp_path, "a", gpus_per_worker=1)})
    other = Kind(1, {job.name: job for job in _jobs(tmp_path, "b", "c", "d")})
    monkeypatch.setattr(training_room, "PATIENCE_S", -1.0)
    monkeypatch.setattr(training_kind, "_in_background", lambda group: training_kind.Future())
    assert (never.num_more(1, []), other.num_more(3, [])) == (1, 1)
    never.start(0, None)
    other.start(1, None)
    assert other.num_more(2, [never.workers]) == 0
    for kind in (never, other):
        kind.hear(News([], [], [], {1: "b"}))
    assert (len(never.starting), len(other.starting)) == (1, 0)
    assert other.num_more(len(other.waiting("abcd")), [never.workers]) == 2
    assert never.num_more(0, [never.workers]) == 0


@pytest.fixture
def no_cpu_free(ray_cluster: None) -> Iterator[Callable[[], None]]:
    """Somebody else holds all CPUs, until the function that this gives is called."""
    held = placement_group([{"CPU": 1}] * int(ray.cluster_resources()["CPU"]))
    ray.get(held.ready())
    yield lambda: remove_placement_group(held)
    remove_placement_group(held)


@pytest.mark.slow
def test_resources_that_others_have_are_waited_for_however_often_ray_train_gives_up(
    no_cpu_free: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ray Train itself, with less patience: they become free at the second try, where one failed start ends all."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "0.5")
    monkeypatch.setattr(training_kind, "MOST_STARTS", 1)
    starts: list[int] = []
    started = Kind.start

    def start(kind: Kind, number: int, board: Any) -> None:
        starts.append(number)
        if len(starts) == 2:
            monkeypatch.delenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S")
            no_cpu_free()
        started(kind, number, board)

    monkeypatch.setattr(Kind, "start", start)
    train_all([small_job(small_run(tmp_path), "a")], Console())
    assert starts == [0, 1]


# ---- the driver stops ------------------------------------------------------------------------------------------------


def _sleeps(values: dict[str, Any]) -> None:
    """Be at a training that takes a step every tenth of a second, for ten minutes."""
    name = ask(values["board"], "take", values["group"], values["kind"])
    reporter = Reporter(values["board"], name)
    root = Path(values["jobs"][name]["run_root"])
    for step in range(6000):
        reporter.steps(step, 6000, seconds_left=600.0)
        (root / f"step of {name}").write_text(str(step))
        time.sleep(0.1)


@pytest.mark.slow
def test_an_interrupted_driver_leaves_at_once_and_its_groups_end(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One group is at a training, the other waits for CPUs that are not free."""
    monkeypatch.setattr(training_group, "train_on_worker", _sleeps)
    num_cpus = int(ray.cluster_resources()["CPU"])
    jobs = [*_jobs(tmp_path, "a", cpus_per_worker=num_cpus - 1), *_jobs(tmp_path, "b", cpus_per_worker=2)]
    left: list[float] = []

    def interrupt() -> None:
        try:
            _wait_until(lambda: any((tmp_path / f"step of {name}").exists() for name in "ab"))
        finally:
            left.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            train_all(jobs, Console())
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - left[0] < 5
    _wait_until(lambda: ray.available_resources().get("CPU") == num_cpus)


@pytest.mark.slow
def test_what_failed_so_far_is_told_where_the_board_dies_for_the_last_time(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(group: Group) -> Exception | None:
        name = ask(group.board, "take", group.number, group.kind)
        if name == "a":
            ask(group.board, "end", group.number, name, "no such file")
            time.sleep(2 * train.POLL_S)
            assert ask(group.board, "take", group.number, group.kind) == "b"
        ray.kill(group.board)
        return RuntimeError("the board is gone")

    monkeypatch.setattr(training_group, "fit", fit)
    with pytest.raises(TrainingError, match=r"(?s)trainings died 3 times: .*\n  a: no such file$"):
        train_all(_jobs(tmp_path, "a", "b"), Console())
