"""A command that dies between any two uploads leaves nothing that is taken for whole, and the next one repairs it."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pytest
from rich.console import Console

from mpo_ray import run_lock
from mpo_ray.cluster.checkpoints import MARK
from mpo_ray.cluster.training_job import TrainingJob, checkpoint_directory
from mpo_ray.config_training import PolicyTraining
from mpo_ray.records import digest
from mpo_ray.run import Run, directory_digest, file_digest
from mpo_ray.run_file import parse_config
from mpo_ray.run_lock import locked
from mpo_ray.stages.stage import STAGES, Context, Stage, run_stage
from mpo_ray.stages.training import clear_checkpoints, is_trained
from tests.object_storage import object_storage
from tests.run_files import MINIMAL

#: What changes a file system; for object storage each is one request, or several that change nothing else.
CHANGES = ("pipe_file", "put_file", "rm_file", "makedirs")


class Died(BaseException):
    """The process is no more: from here on nothing that it does reaches storage."""


@dataclass
class Life:
    """Counts changes of storage, and ends with the one of number `last`."""

    last: int | None = None
    changes: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def watch(self, filesystem: Any, patch: pytest.MonkeyPatch) -> None:
        for name in CHANGES:
            patch.setattr(type(filesystem), name, self._counted(getattr(type(filesystem), name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            with self._lock:
                self.changes += 1
                if self.last is not None and self.changes > self.last:
                    raise Died
            return real(*given, **named)

        return call


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.slow)])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(run_lock, "SETTLE_S", 0.0)
    if request.param == "memory":
        yield f"memory://{uuid4().hex}"
        return
    with object_storage(monkeypatch) as url:
        yield url


# ---- a run of four small stages, by the means of the real ones -------------------------------------------------------


def _write_data(context: Context) -> None:
    run, seed = context.run, context.config.seed
    run.remove("comparisons/a")
    for index in range(2 if seed else 3):
        rows = [{"x": 10 * seed + index}]
        run.write_table(f"comparisons/a/train-{index:05d}.parquet", pa.Table.from_pylist(rows), inputs=digest(rows))
    run.write_json("comparisons/counts.json", {"train": seed})


def _job(context: Context) -> TrainingJob:
    return TrainingJob(
        name="a",
        inputs=digest([context.run.inputs_of(part) for part in context.run.parts("comparisons/a")]),
        run_root=context.run.root,
        model="base",
        training=PolicyTraining(),
        train_parts=[],
        heldout_parts=[],
        output="policies/a",
        seed=0,
    )


def _train(context: Context) -> None:
    """What the workers leave, without the training."""
    job, seed = _job(context), context.config.seed
    if is_trained(context.run, job):
        return
    for node in CHECKPOINT:
        context.run.write_bytes(f"{job.directory}/{node}", bytes([seed]))
    with context.run.publishing(job.output, mark="training.json") as directory:
        (directory / "adapter_config.json").write_text(json.dumps({"seed": seed}))
        (directory / "adapter_model.safetensors").write_bytes(bytes([seed]) * 100)
        if seed == 0:
            (directory / "only_of_the_first").touch()
        files = {path.name: [path.stat().st_size, file_digest(str(path))] for path in directory.iterdir()}
        (directory / "training.json").write_text(json.dumps({"inputs": job.inputs, "files": files}))


def _fit(context: Context) -> None:
    context.run.write_json("fit.json", {"weights": context.run.read_table("comparisons/a")["x"].to_pylist()})
    context.run.write_json("trade_off.json", {})


def _mix(context: Context) -> None:
    policy = context.run.fetch("policies/a")
    with context.run.publishing("mixture") as directory:
        (directory / "config.json").write_text(json.dumps({"policy": directory_digest(policy)}))
        (directory / "fit.json").write_text(json.dumps(context.run.read_json("fit.json")))


OUTPUTS = {
    "data": ["comparisons"],
    "policies": ["policies/a"],
    "fit": ["fit.json", "trade_off.json"],
    "mix": ["mixture"],
}
CHECKPOINT = ("checkpoint_step_1/digests-0.json", "checkpoint_step_1/state/weights.pt", f"checkpoint_step_1/{MARK}")
WORK = {"data": _write_data, "policies": _train, "fit": _fit, "mix": _mix}


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    made: list[Stage] = []
    for name, work in WORK.items():
        after = (made[-1].name,) if made else ()
        outputs = OUTPUTS[name]
        made.append(
            Stage(name, name, after, lambda _, outputs=outputs: outputs, lambda context: context.config.seed, work)  # type: ignore[misc]
        )
    made[1] = replace(made[1], clear=lambda context: clear_checkpoints(context, {"a": "policies/a"}))
    for stage in made:
        monkeypatch.setitem(STAGES, stage.name, stage)
    return made


def _command(storage: str, name: str, stages: list[Stage], seed: int) -> Context:
    """`mpo-ray run --update`, without Ray."""
    config = parse_config(copy.deepcopy(MINIMAL), [f"storage={storage}", f"name={name}", f"seed={seed}"])
    run = Run.check(config, update=True)
    with locked(run, "mpo-ray run"):
        run.begin(config)
        context = Context(config, run, Console(quiet=True))
        for stage in stages:
            run_stage(context, stage)
    return context


def _contents(run: Run, *nodes: str) -> dict[str, bytes | None]:
    """Every file of the nodes, or of the run but for what names times and places."""
    found = {node: run.read_bytes(node) for start in nodes or ("",) for node in run.files(start)}
    return {node: content for node, content in found.items() if node not in ("manifest.json", "config.yaml")}


def _copy(run: Run, to: Run) -> None:
    for node in run.files(""):
        to.write_bytes(node, run.read_bytes(node) or b"")


def test_a_kill_between_any_two_uploads_is_repaired_by_the_next_run(
    storage: str, stages: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a first run, and in one that replaces another: after it, what it vouches for is whole; then everything is.

    On object storage every fifth moment; all of them, which takes five minutes, with MPO_RAY_EVERY_UPLOAD=1.
    """
    every = 1 if storage.startswith("memory") or os.environ.get("MPO_RAY_EVERY_UPLOAD") else 5
    expected = [_contents(_command(storage, f"unbroken{seed}", stages, seed).run) for seed in (0, 1)]
    for before in (None, 0):
        seed = 0 if before is None else 1
        kills = 0
        while True:
            name = f"broken-{seed}-{kills}"
            if before is not None:
                _copy(Run(storage, "unbroken0"), Run(storage, name))
            life = Life(last=kills)
            with pytest.MonkeyPatch.context() as patch:
                life.watch(Run(storage, name).filesystem, patch)
                try:
                    _command(storage, name, stages, seed)
                    ended = True
                except Died:
                    ended = False
            config = parse_config(copy.deepcopy(MINIMAL), [f"storage={storage}", f"name={name}", f"seed={seed}"])
            context = Context(config, Run(storage, name), Console(quiet=True))
            for stage in stages:
                if context.run.is_complete(stage.name, context.inputs(stage)):
                    nodes = OUTPUTS[stage.name]
                    wanted = {
                        node: content for node, content in expected[seed].items() if node.startswith(tuple(nodes))
                    }
                    assert _contents(context.run, *nodes) == wanted, f"after change {kills}: {stage.name} is complete"
            for files in expected:  # of what it replaces as well: its config may come back
                inputs = json.loads(files["policies/a/training.json"] or b"")["inputs"]
                if is_trained(context.run, _job(context).model_copy(update={"inputs": inputs})):
                    whole = {node: content for node, content in files.items() if node.startswith("policies")}
                    assert _contents(context.run, "policies/a") == whole, f"after change {kills}: the policy is trained"
                    if files is expected[seed] and not context.run.is_complete("policies", context.inputs(stages[1])):
                        left = context.run.files(checkpoint_directory("a", inputs))
                        assert len(left) == len(CHECKPOINT), f"after change {kills}: a policy without a record"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(run_lock, "_lives", lambda _: False)  # its process is this one, which goes on
                assert _contents(_command(storage, name, stages, seed).run) == expected[seed], f"after change {kills}"
            if ended:
                break
            kills += every
        assert kills > 20
