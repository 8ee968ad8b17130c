"""The run directory: what is published is whole, what is complete is known, and two configs never share one."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest

from mpo_ray.records import decode_prompt, encode_prompt, prompt_id
from mpo_ray.run import Run, directory_digest, file_digest, stage_inputs
from mpo_ray.run_file import parse_config
from mpo_ray.storage import RunError
from tests.run_files import MINIMAL


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A directory of this machine, and an fsspec URL."""
    if request.param == "local":
        yield str(tmp_path / "runs")
        return
    root = f"/{uuid4().hex}"
    yield f"memory:/{root}"
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists(root):
        filesystem.rm(root, recursive=True)


def open_run(storage: str, *overrides: str, update: bool = False) -> Run:
    return Run.open(parse_config(copy.deepcopy(MINIMAL), [f"storage={storage}", *overrides]), update=update)


def files_of(run: Run) -> list[str]:
    """Every file of the run directory, by its path below it."""
    filesystem, base = fsspec.core.url_to_fs(run.root)
    return sorted(path.removeprefix(base).lstrip("/") for path in filesystem.find(base))


# ---- one config, one run directory --------------------------------------------------------------------------------


def test_a_new_run_holds_its_config_and_nothing_else(storage: str) -> None:
    """The probe of `check_writable` is gone again, and the config reads back as it was."""
    config = parse_config(copy.deepcopy(MINIMAL), [f"storage={storage}"])
    run = Run.open(config)
    assert files_of(run) == ["config.yaml"]
    assert run.read_config() == config.as_json()
    assert Run.at(run.root).root == run.root


def test_the_same_config_opens_its_run_again(storage: str) -> None:
    """What is there stays there."""
    open_run(storage).write_text("note.txt", "kept")
    assert open_run(storage).read_text("note.txt") == "kept"


def test_another_config_is_refused_and_the_difference_named(storage: str) -> None:
    """place, old value, new value, what to do; the stored config stays."""
    run = open_run(storage)
    with pytest.raises(RunError, match=r"policies\.beta is 0\.5 there and 0\.1 here.*--update"):
        open_run(storage, "policies.beta=0.1")
    with pytest.raises(RunError, match=r"objectives\.third is None there and \{.*\} here"):
        open_run(storage, "objectives.third={preferences: {hub: x}}")
    stored = run.read_config()
    assert stored is not None
    assert stored["policies"]["beta"] == 0.5


def test_a_run_that_was_moved_is_the_same_run(tmp_path: Path) -> None:
    """`storage` says where the run lies, not what it is; the config there then says the new place."""
    open_run(str(tmp_path / "old")).write_text("note.txt", "kept")
    (tmp_path / "old").rename(tmp_path / "new")
    moved = open_run(str(tmp_path / "new"))
    assert moved.read_text("note.txt") == "kept"
    stored = moved.read_config()
    assert stored is not None
    assert stored["storage"] == str(tmp_path / "new")
    with pytest.raises(RunError, match="seed is 0 there and 1 here"):
        open_run(str(tmp_path / "new"), "seed=1")


def test_update_replaces_the_config_and_keeps_the_stages(storage: str) -> None:
    """Stages whose inputs changed are found by their digests, not thrown away here."""
    run = open_run(storage)
    run.write_text("base/model", "x")
    run.complete("reference", "abc", outputs=["base"], seconds=1.0)
    updated = open_run(storage, "policies.beta=0.1", update=True)
    stored = updated.read_config()
    assert stored is not None
    assert stored["policies"]["beta"] == 0.1
    assert updated.is_complete("reference", "abc")


def test_a_directory_that_is_no_run_is_refused(storage: str) -> None:
    """`Run.at` opens what is there and makes nothing."""
    with pytest.raises(RunError, match=r"nothing is not a run directory: it has no config\.yaml"):
        Run.at(f"{storage}/nothing")


def test_storage_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A file stands where the directory should be; a protocol that nobody knows."""
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match=r"runs/trial cannot be written: .*Set `storage:`"):
        open_run(str(tmp_path / "runs"))
    with pytest.raises(RunError, match=r"nowhere://bucket/trial cannot be used: .*Set `storage:`"):
        open_run("nowhere://bucket")


def test_a_relative_storage_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's workers run in other working directories."""
    monkeypatch.chdir(tmp_path)
    run = open_run("runs")
    assert run.root == str(tmp_path / "runs" / "trial")
    assert Run.at("runs/trial").root == run.root
    assert open_run(f"file://{tmp_path}/runs").root == run.root


def test_errors_survive_pickling() -> None:
    """Ray carries them from worker to driver."""
    error = pickle.loads(pickle.dumps(RunError("what is wrong")))
    assert isinstance(error, RunError)
    assert str(error) == "what is wrong"


# ---- publishing ---------------------------------------------------------------------------------------------------


def test_what_a_block_leaves_is_published_whole(storage: str) -> None:
    """Files and directories, at the node's place; nothing of the work remains beside them."""
    run = open_run(storage)
    with run.publishing("policies/helpful") as directory:
        (directory / "weights").mkdir()
        (directory / "weights" / "a.bin").write_bytes(b"\x00\x01")
        (directory / "config.json").write_text("{}")
        assert not run.exists("policies/helpful")
    assert files_of(run) == ["config.yaml", "policies/helpful/config.json", "policies/helpful/weights/a.bin"]
    assert (run.fetch("policies/helpful") / "weights" / "a.bin").read_bytes() == b"\x00\x01"


def test_publishing_to_a_directory_is_one_rename(tmp_path: Path) -> None:
    """The published directory is the one that was filled: there is no moment at which a part of it is there."""
    run = open_run(str(tmp_path))
    with run.publishing("base") as directory:
        (directory / "model").write_text("x")
        filled = directory.stat().st_ino
    assert run.fetch("base").stat().st_ino == filled


def test_a_block_that_fails_leaves_what_was_there(storage: str) -> None:
    """An exception in the middle: the old output is whole, the new one nowhere."""
    run = open_run(storage)
    with run.publishing("mixture") as directory:
        (directory / "weights.json").write_text("old")

    def fill_and_fail() -> None:
        with run.publishing("mixture") as directory:
            (directory / "weights.json").write_text("new")
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fill_and_fail()
    assert run.read_text("mixture/weights.json") == "old"
    assert files_of(run) == ["config.yaml", "mixture/weights.json"]


def test_publishing_again_replaces_all_of_the_old(storage: str) -> None:
    """A file that only the old output had is gone, here and in what is fetched."""
    run = open_run(storage)
    for name in ("first", "second"):
        with run.publishing("samples") as directory:
            (directory / name).write_text(name)
        assert sorted(path.name for path in run.fetch("samples").iterdir()) == [name]
    assert files_of(run) == ["config.yaml", "samples/second"]


def test_what_was_fetched_stays_while_the_run_goes_on() -> None:
    """Processes of one machine share fetched copies: a new version gets a new place, a second fetch copies nothing."""
    run = open_run(f"memory://{uuid4().hex}")
    run.write_text("node/a.txt", "old")
    run.write_text("file.txt", "alone")
    first = run.fetch("node")
    assert run.fetch("node") == first
    (first / "mark").touch()
    assert (run.fetch("node") / "mark").exists()
    run.write_text("node/a.txt", "new")
    assert (run.fetch("node") / "a.txt").read_text() == "new"
    assert (first / "a.txt").read_text() == "old"
    assert run.fetch("file.txt").read_text() == "alone"


def test_what_is_not_there_cannot_be_fetched(storage: str) -> None:
    """The node and the run are named."""
    with pytest.raises(RunError, match=r"trial has no mixture"):
        open_run(storage).fetch("mixture")


def test_a_file_is_replaced_whole_and_reads_back(storage: str) -> None:
    """Text in any script, JSON, and None for what is not there."""
    run = open_run(storage)
    run.write_text("a/b.txt", "λ, first and longer")
    run.write_text("a/b.txt", "λ")
    assert run.read_text("a/b.txt") == "λ"
    run.write_json("c.json", {"λ": [1, 2.5, None]})
    assert run.read_json("c.json") == {"λ": [1, 2.5, None]}
    assert run.read_text("absent") is None
    assert run.read_json("absent") is None
    assert files_of(run) == ["a/b.txt", "c.json", "config.yaml"]


# ---- completeness -------------------------------------------------------------------------------------------------


def test_a_stage_is_complete_for_its_inputs_while_its_outputs_are_there(storage: str) -> None:
    """Not before, not from other inputs, not when an output is lost."""
    run = open_run(storage)
    inputs = stage_inputs({"beta": 0.5}, "digest of the comparisons")
    assert not run.is_complete("policies", inputs)
    for node in ("policies/helpful/a", "policies/harmless/a"):
        run.write_text(node, "weights")
    run.complete("policies", inputs, outputs=["policies/helpful", "policies/harmless"], seconds=2.34, notes={"n": 1})
    assert run.is_complete("policies", inputs)
    assert not run.is_complete("policies", stage_inputs({"beta": 0.1}, "digest of the comparisons"))
    assert not run.is_complete("samples", inputs)
    assert Run.at(run.root).is_complete("policies", inputs)

    record = run.manifest()["stages"]["policies"]
    assert (record["seconds"], record["notes"]) == (2.3, {"n": 1})
    assert run.manifest()["versions"]["torch"]

    filesystem, base = fsspec.core.url_to_fs(run.root)
    filesystem.rm(f"{base}/policies/harmless", recursive=True)
    assert not run.is_complete("policies", inputs)


def test_stages_keep_each_others_records(storage: str) -> None:
    """Completing one leaves the others as they were; completing one again replaces its record."""
    run = open_run(storage)
    run.complete("a", "1", outputs=[], seconds=0.0)
    run.complete("b", "2", outputs=[], seconds=0.0)
    run.complete("a", "3", outputs=[], seconds=0.0)
    assert run.is_complete("b", "2")
    assert run.is_complete("a", "3")
    assert not run.is_complete("a", "1")


# ---- digests ------------------------------------------------------------------------------------------------------


def test_a_directorys_digest_follows_names_and_contents(tmp_path: Path) -> None:
    """Equal files in equal places, equal digest; a byte, a name or a place changes it."""
    digests: dict[str, str] = {}
    for case, files in {
        "one": {"a": "1", "b/c": "2"},
        "same": {"b/c": "2", "a": "1"},
        "byte": {"a": "1", "b/c": "3"},
        "name": {"a": "1", "b/d": "2"},
        "moved": {"a": "1", "c": "2"},
        "swapped": {"a": "2", "b/c": "1"},
    }.items():
        for name, text in files.items():
            path = tmp_path / case / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        digests[case] = directory_digest(tmp_path / case)
    assert digests["one"] == digests["same"]
    assert len(set(digests.values())) == 5


def test_a_files_digest_is_its_sha256_here_and_far(tmp_path: Path) -> None:
    """Also for files longer than one block."""
    content = b"ab" * (1 << 20)
    (tmp_path / "file").write_bytes(content)
    with fsspec.open(f"memory://{tmp_path.name}/file", "wb") as file:
        file.write(content)
    assert file_digest(str(tmp_path / "file")) == file_digest(f"memory://{tmp_path.name}/file")
    (tmp_path / "empty").touch()
    assert file_digest(str(tmp_path / "empty")).startswith("e3b0c44298fc1c14")
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_stage_inputs_depend_on_every_value() -> None:
    """Order, nesting and type count; the order of keys does not."""
    values: list[tuple[Any, ...]] = [("a", "b"), ("b", "a"), (["a", "b"],), ("ab",), ("a", 1), ("a", "1")]
    assert len({stage_inputs(*value) for value in values}) == len(values)
    assert stage_inputs({"x": 1, "y": 2}) == stage_inputs(json.loads('{"y": 2, "x": 1}'))


# ---- prompts, as every table of a run writes them -------------------------------------------------------------------


def test_a_prompt_reads_back_as_it_was_written() -> None:
    """A string that looks like JSON stays a string; messages stay messages."""
    chat = ({"role": "system", "content": "Sei höflich."}, {"role": "user", "content": "λ?"})
    for prompt in ("plain", '[{"role": "user"}]', "", chat):
        assert decode_prompt(*encode_prompt(prompt)) == prompt


def test_a_prompts_id_is_its_content() -> None:
    """The same for the same prompt whatever the order of a message's keys; another for a string of the same text."""
    chat = ({"role": "user", "content": "hello"},)
    assert prompt_id(chat) == prompt_id(({"content": "hello", "role": "user"},))
    text, _ = encode_prompt(chat)
    assert len({prompt_id(chat), prompt_id(text), prompt_id("hello"), prompt_id("hello ")}) == 4
