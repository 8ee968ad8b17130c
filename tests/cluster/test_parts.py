"""Parts of a stage: only what is missing is made, and a failure leaves what is finished."""

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from rich.console import Console

from mpo_ray.cluster.parts import DEATHS, MOST_DEATHS, Part, in_order, process_parts
from mpo_ray.config import Actors
from mpo_ray.out_of_memory import OutOfMemoryError
from mpo_ray.run import Run, StageError
from mpo_ray.storage import INPUTS

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Doubler:
    """A worker: doubles, notes that it was loaded, and refuses one value."""

    def __init__(self, notes: str, refused: int | None = None) -> None:
        self._notes, self._refused = Path(notes), refused
        with self._notes.open("a") as file:
            file.write("loaded\n")

    def __call__(self, table: pa.Table, values: dict[str, Any]) -> pa.Table:
        numbers = table["x"].to_pylist()
        if self._refused in numbers:
            raise ValueError(f"{self._refused} cannot be doubled")
        return pa.table({"y": [2 * x + values["plus"] for x in numbers]})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(str(tmp_path), "parts")
    run.write_text("config.yaml", "{}")
    for index in range(6):
        run.write_table(f"in/part-{index}.parquet", pa.table({"x": [index]}))
    return run


def _process(run: Run, refused: int | None = None) -> None:
    process_parts(
        run,
        [Part(f"in/part-{i}.parquet", f"out/part-{i}.parquet", f"of {i}", {"plus": 10 * i}) for i in range(6)],
        Doubler,
        {"notes": str(run.local / "notes"), "refused": refused},
        actors=Actors(num_actors=1),
        console=Console(stderr=True),
        title="doubling",
    )


def test_every_part_is_made_by_one_actor_that_loads_once(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    _process(run)
    assert run.read_table("out")["y"].to_pylist() == [2 * i + 10 * i for i in range(6)]
    assert (run.local / "notes").read_text() == "loaded\n"
    assert "doubling: 6/6" in capsys.readouterr().err


def test_a_failure_is_the_workers_own_error_and_finished_parts_are_not_made_again(run: Run) -> None:
    with pytest.raises(ValueError, match="4 cannot be doubled"):
        _process(run, refused=4)
    finished = {path: path.stat().st_mtime_ns for path in (run.local / "out").iterdir()}
    assert 0 < len(finished) < 6
    _process(run)
    assert len(run.parts("out")) == 6
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())
    loaded = (run.local / "notes").read_text()
    _process(run)
    assert (run.local / "notes").read_text() == loaded  # nothing to do: no actor is started


class Greedy:
    """A worker: meets a real limit of its process's memory, while it is made or at its first part."""

    def __init__(self, at_once: bool) -> None:
        if at_once:
            self.take()

    def __call__(self, table: pa.Table, values: dict[str, Any]) -> pa.Table:
        self.take()
        return table

    def take(self) -> None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, resource.RLIM_INFINITY))
        torch.ones(2**28)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_lack_of_memory_ends_in_one_sentence_with_the_setting_that_lowers_it(run: Run, at_once: bool) -> None:
    parts = [Part("in/part-0.parquet", "out/part-0.parquet", "")]
    how = {"actors": Actors(batch_size=8, precision="bf16"), "console": Console(stderr=True), "title": "scores"}
    with pytest.raises(OutOfMemoryError) as raised:
        process_parts(run, parts, Greedy, {"at_once": at_once}, **how)
    assert str(raised.value) == (
        "scores: out of memory: 1.00 GiB of memory could not be had. Lower scoring.batch_size (now 8), or lower "
        "scoring.prompts_per_part (now 32)."
    )


class Mortal:
    """A worker whose process is killed at one of its parts, as often as it is told to."""

    def __init__(self, notes: str, times: int) -> None:
        self._notes, self._times = Path(notes), times

    def __call__(self, table: pa.Table, values: dict[str, Any]) -> pa.Table:
        if table["x"].to_pylist() == [1]:
            with self._notes.open("a") as file:
                file.write("begun\n")
            if len(self._notes.read_text().splitlines()) <= self._times:
                os.kill(os.getpid(), signal.SIGKILL)
        return table


def _process_mortal(run: Run, times: int) -> None:
    process_parts(
        run,
        [Part(f"in/part-{i}.parquet", f"out/part-{i}.parquet", f"of {i}") for i in range(3)],
        Mortal,
        {"notes": str(run.local / "notes"), "times": times},
        actors=Actors(num_actors=1),
        console=Console(stderr=True),
        title="copies",
        remedy="Lower something.",
    )


def test_a_part_at_which_every_process_dies_ends_the_stage_in_one_sentence(run: Run) -> None:
    """As when the kernel kills whatever needs too much memory; the next command begins its count anew."""
    with pytest.raises(StageError) as caught:
        _process_mortal(run, times=99)
    assert str(caught.value) == (
        f"copies: {MOST_DEATHS} processes died at out/part-1.parquet, as when the system has no memory left (signal "
        "9). Lower something. Finished files stay; the same command goes on from there."
    )
    assert len((run.local / "notes").read_text().splitlines()) == MOST_DEATHS
    assert "out/part-0.parquet" in run.parts("out")
    _process_mortal(run, times=MOST_DEATHS + 2)
    assert len(run.parts("out")) == 3
    assert not list((run.local / DEATHS).rglob("*.json"))


class Columns:
    """A worker: gives every column that is wanted and not there yet."""

    def __call__(self, table: pa.Table, values: dict[str, Any]) -> pa.Table:
        for name in values["wanted"]:
            if name not in table.column_names:
                table = table.append_column(name, pa.array(["new"] * table.num_rows))
        return table


def test_a_part_is_made_again_exactly_where_its_inputs_changed(run: Run) -> None:
    """Same inputs: kept; other inputs, none, or a damaged file: made; what no part wants: removed."""
    for index, inputs in enumerate(["same", "other", None]):
        run.write_table(f"out/part-{index}.parquet", pa.table({"y": [-1]}), inputs=inputs)
    run.write_bytes("out/part-3.parquet", b"PAR1 and then nothing")
    run.write_table("out/part-9.parquet", pa.table({"y": [-1]}), inputs="same")
    run.write_table("beside/part-9.parquet", pa.table({"y": [-1]}), inputs="same")
    columns = {"new_a": "1", "new_b": "2", "new_c": "3"}
    old = pa.table({"new_c": ["old"], "gone": ["old"], "x": [5], "new_a": ["old"], "new_b": ["old"]})
    run.write_table(
        "out/part-5.parquet", in_order(old, {"gone": "0", "new_c": "3", "new_b": "of before", "new_a": "1"})
    )
    parts = [Part(f"in/part-{i}.parquet", f"out/part-{i}.parquet", "same", {"wanted": []}) for i in range(5)]
    parts += [Part("in/part-5.parquet", "out/part-5.parquet", "all", {"wanted": list(columns)}, columns)]
    process_parts(run, parts, Columns, {}, actors=Actors(), console=Console(stderr=True), title="columns")
    assert run.read_table("out/part-0.parquet").to_pylist() == [{"y": -1}]
    assert [run.read_table(f"out/part-{i}.parquet").to_pylist() for i in range(1, 5)] == [
        [{"x": i}] for i in range(1, 5)
    ]
    assert run.parts("out") == [f"out/part-{i}.parquet" for i in range(6)]
    assert run.parts("beside") == ["beside/part-9.parquet"]
    table = run.read_table("out/part-5.parquet")
    assert table.to_pylist() == [{"x": 5, "new_a": "old", "new_b": "new", "new_c": "old"}]
    assert table.column_names == ["x", *columns]
    assert {f.name: f.metadata[INPUTS].decode() for f in table.schema if f.name != "x"} == columns
    assert run.inputs_of("out/part-5.parquet") == "all"
