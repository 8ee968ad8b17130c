"""Parts of a stage: only what is missing is made, and a failure leaves what is finished."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from mpo_ray.cluster.parts import Part, process_parts
from mpo_ray.config import Actors
from mpo_ray.run import Run

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
