"""What is lost or changed in a finished run is found by the next command, told by name, and made again."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pytest
from rich.console import Console

from mpo_ray.run import Run
from mpo_ray.run_file import parse_config
from mpo_ray.stages.pipeline import run_single
from mpo_ray.stages.stage import STAGES, Context, Stage, run_stage
from mpo_ray.storage import RunError
from tests.run_files import MINIMAL

TABLE = "scores/part-0.parquet"


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    return _open(str(tmp_path) if request.param == "local" else f"memory://{uuid4().hex}")


def _open(storage: str) -> Run:
    return Run.open(parse_config(copy.deepcopy(MINIMAL), [f"storage={storage}"]))


def _finished(run: Run) -> Run:
    """A stage of three files, by what every stage uses."""
    for index in range(2):
        run.write_table(f"scores/part-{index}.parquet", pa.table({"x": list(range(1000))}), inputs=str(index))
    run.write_json("scores/counts.json", {"rows": 2000})
    run.complete("scores", "inputs", outputs=["scores"], seconds=1.0)
    assert run.is_complete("scores", "inputs")
    return run


def _flip(content: bytes) -> bytes:
    """The same length, another content, far from the footer."""
    return content[:40] + bytes([content[40] ^ 1]) + content[41:]


DAMAGES: dict[str, Callable[[Run], None]] = {
    "is missing": lambda run: run.remove(TABLE),
    "has 100 bytes instead of": lambda run: run.write_bytes(TABLE, (run.read_bytes(TABLE) or b"")[:100]),
    "has 0 bytes instead of": lambda run: run.write_bytes("scores/counts.json", b""),
    "has another content than was written": lambda run: run.write_bytes(
        "scores/counts.json", _flip(b" " * 50 + b"x" * 50)[: len(run.read_bytes("scores/counts.json") or b"")]
    ),
    "belongs to no part": lambda run: run.write_table("scores/part-9.parquet", pa.table({"x": [1]})),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_damage_to_what_a_stage_made_is_found(run: Run, problem: str) -> None:
    """By listing alone where size or number tell it; the stage is then not complete."""
    DAMAGES[problem](_finished(run))
    found = run.finished("scores", "inputs")
    assert found is not None
    assert [text for text in found.damaged.values() if text.startswith(problem)] == list(found.damaged.values())
    assert len(found.damaged) == 1
    assert not run.is_complete("scores", "inputs")


@pytest.mark.parametrize("change", [{"files": {TABLE: None}}, {"files": []}, {"inputs": None}, {"outputs": "scores"}])
def test_a_record_that_makes_no_sense_counts_as_none(run: Run, change: dict[str, object]) -> None:
    """Its stage looks for what is there; the other records stand."""
    _finished(run).complete("fit", "inputs", outputs=[], seconds=1.0)
    manifest = run.read_json("manifest.json")
    manifest["stages"]["scores"] |= change
    run.write_json("manifest.json", manifest)
    assert run.finished("scores", "inputs") is None
    assert run.is_complete("fit", "inputs")


def test_hidden_files_that_other_programs_leave_are_nobodys(run: Run) -> None:
    """As macOS leaves one beside each file that it copies."""
    _finished(run).write_bytes("scores/._part-0.parquet", b"not a table")
    assert run.is_complete("scores", "inputs")
    assert run.read_table("scores").num_rows == 2000


def test_another_content_of_the_same_length_is_found_here(tmp_path: Path) -> None:
    """A byte of a table, also where its size stays: its time of change has it read."""
    run = _finished(_open(str(tmp_path)))
    path = run.local / TABLE
    path.write_bytes(_flip(path.read_bytes()))
    found = run.finished("scores", "inputs")
    assert found is not None
    assert found.damaged == {TABLE: "has another content than was written"}


def test_a_copy_is_read_once_and_is_complete(tmp_path: Path) -> None:
    """New times of change, the same contents: nothing is done again, and the new times are recorded."""
    run = _finished(_open(str(tmp_path / "a")))
    shutil.copytree(run.root, tmp_path / "b" / "trial", copy_function=shutil.copyfile)
    copied = _open(str(tmp_path / "b"))
    os.utime(copied.local / TABLE, ns=(time.time_ns(), time.time_ns() + 10**9))
    found = copied.finished("scores", "inputs")
    assert found is not None
    assert not found.damaged
    assert found.renewed
    copied.renew("scores", found)
    again = copied.finished("scores", "inputs")
    assert again is not None
    assert not again.renewed


def test_the_next_command_makes_what_is_damaged_and_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that: the other parts stay as they are."""
    made: list[str] = []

    def work(context: Context) -> None:
        for index in range(2):
            node = f"scores/part-{index}.parquet"
            if context.run.inputs_of(node) != str(index) if context.run.exists(node) else True:
                made.append(node)
                context.run.write_table(node, pa.table({"x": [index]}), inputs=str(index))

    stage = Stage("scores", "Scores", (), lambda _: ["scores"], lambda _: "same", work)
    monkeypatch.setitem(STAGES, "scores", stage)
    said = io.StringIO()
    config = parse_config(copy.deepcopy(MINIMAL))
    assert run_stage(Context(config, run, Console(file=said)), stage)
    whole = run.read_bytes(TABLE)
    run.write_bytes(TABLE, _flip(whole or b"") + b"more")
    assert run_stage(Context(config, run, Console(file=said, width=300)), stage)
    assert made == ["scores/part-0.parquet", "scores/part-1.parquet", TABLE]
    assert (
        f"{TABLE} has {len(whole or b'') + 4} bytes instead of {len(whole or b'')}: it is made again" in said.getvalue()
    )
    assert run.read_bytes(TABLE) == whole
    assert not run_stage(Context(config, run, Console(file=said)), stage)


def test_files_that_cannot_be_read_are_named_with_the_remedy(run: Run) -> None:
    """Cut off, a flipped byte within a table, no JSON, no UTF-8."""
    _finished(run)
    table, remedy = run.read_bytes(TABLE) or b"", r"is damaged: .*Delete it and run the same command again"
    for content in (b"", table[:100], table[:-10], _flip(table), b"x" * 50):
        run.write_bytes(TABLE, content)
        with pytest.raises(RunError, match=rf"(?s){TABLE} {remedy}"):
            run.read_table("scores")
    assert run.inputs_of(TABLE) is None
    for content in (b"", b'{"weights": {"a": 0.', b"\xff\xfe{}"):
        run.write_bytes("fit.json", content)
        with pytest.raises(RunError, match=rf"fit\.json {remedy}"):
            run.read_json("fit.json")
    for content in (b"name: [", b"", b"\xff"):
        run.write_bytes("config.yaml", content)
        with pytest.raises(RunError, match=r"config\.yaml (cannot be read|is damaged)"):
            run.read_config()


def test_a_manifest_that_cannot_be_read_counts_as_none(run: Run) -> None:
    """Each stage then looks for what is there; the next that is finished writes a new one."""
    _finished(run)
    for content in (b"", b'{"stages": {"scor', b"[]", b"{}"):
        run.write_bytes("manifest.json", content)
        assert "manifest.json cannot be read" in (run.manifest_problem() or "")
        assert not run.is_complete("scores", "inputs")
    run.complete("scores", "inputs", outputs=["scores"], seconds=1.0)
    assert run.manifest_problem() is None
    assert run.is_complete("scores", "inputs")


def test_a_stage_that_needs_a_damaged_one_names_the_file(tmp_path: Path) -> None:
    run = _open(str(tmp_path))
    config = parse_config(copy.deepcopy(MINIMAL), [f"storage={tmp_path}"])
    context = Context(config, run, Console(quiet=True))
    run.write_text("embedded/pairs.jsonl", "{}\n")
    run.complete("embedded", context.inputs(STAGES["embedded"]), outputs=["embedded"], seconds=1.0)
    run.remove("embedded/pairs.jsonl")
    with pytest.raises(
        RunError, match=r"'embedded', which is not complete .* embedded/pairs\.jsonl is missing\. Run it"
    ):
        run_single(context, "data")


def test_a_record_of_an_earlier_version_is_believed(run: Run) -> None:
    """It names no files; its outputs are looked for."""
    _finished(run)
    manifest = run.manifest()
    del manifest["stages"]["scores"]["files"]
    run.write_json("manifest.json", manifest)
    assert run.is_complete("scores", "inputs")
    run.remove("scores")
    assert not run.is_complete("scores", "inputs")


# ---- paths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["local", "memory"])
@pytest.mark.parametrize("name", ["runs[1]", "a*b", "what?", "{x,y}", "sp ace", "100%"])
def test_a_path_may_hold_any_character(tmp_path: Path, where: str, name: str) -> None:
    """Nothing takes a run's own path for a pattern."""
    run = _open(str(tmp_path / name) if where == "local" else f"memory://{uuid4().hex}/{name}")
    _finished(run)
    assert run.parts("scores") == ["scores/part-0.parquet", "scores/part-1.parquet"]
    assert run.read_table("scores").num_rows == 2000
    with run.publishing("base", mark="training.json") as directory:
        (directory / "training.json").write_text("{}")
        (directory / "[a]*").write_text("x")
    assert json.loads((run.fetch("base") / "training.json").read_text()) == {}
    assert sorted(run.files("base")) == ["base/[a]*", "base/training.json"]
    assert Run.at(run.root).is_complete("scores", "inputs")
    run.remove("base/[a]*")
    assert sorted(run.files("base")) == ["base/training.json"]
    run.remove("scores")
    assert not run.exists("scores")


def test_a_fetched_copy_that_lost_a_file_is_fetched_again() -> None:
    """Temporary directories are cleaned by age, a file at a time."""
    run = Run(f"memory://{uuid4().hex}", "run")
    for name in ("a", "b/c"):
        run.write_text(f"model/{name}", name)
    copy_ = run.fetch("model")
    (copy_ / "b" / "c").unlink()
    assert run.fetch("model") == copy_
    assert (copy_ / "b" / "c").read_text() == "b/c"
