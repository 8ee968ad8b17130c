"""The DeepSpeed engine: every ZeRO stage takes the same steps as plain AdamW, and a checkpoint continues them."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from mpo_ray.cluster.checkpoints import (
    MARK,
    CheckpointError,
    checkpoints,
    new_checkpoint,
    opened_checkpoint,
    read_checkpoint,
)
from mpo_ray.cluster.deepspeed_engine import DeepSpeedEngine, deepspeed_config, prepare_sharded_loading
from mpo_ray.cluster.train_worker import _export
from mpo_ray.cluster.trainable import load_trainable
from mpo_ray.cluster.training_job import TrainingJob
from mpo_ray.config_training import PolicyTraining
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.policies.loading import load_model, load_tokenizer
from mpo_ray.run import Run
from mpo_ray.stages.training import is_trained
from mpo_ray.training.loop import train
from mpo_ray.training.sft import Example, sft_loss
from tests.tiny import tiny_llama, tiny_tokenizer

EXAMPLES = [Example([1, 7 + i], [7 + (3 * i + j) % 18 for j in range(2 + i % 3)]) for i in range(16)]
STEPS = 6
pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("base"), tiny_tokenizer(), seed=0))


def _training(**changes: object) -> PolicyTraining:
    values = {
        "lora": None,
        "batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 0.01,
        "warmup_share": 0.5,
        "weight_decay": 0.1,
    }
    return PolicyTraining.model_validate({**values, "max_grad_norm": 0.5, **changes})


def _engine(base: str, training: PolicyTraining) -> DeepSpeedEngine:
    sharded = prepare_sharded_loading(training, world_size=1)
    model = CompletionModel(load_trainable(base, training, seed=0))
    del sharded
    return DeepSpeedEngine(model, training, total_steps=STEPS, device=torch.device("cpu"))


def _losses(engine: DeepSpeedEngine, start: int, end: int) -> list[float]:
    def loss_of(examples: np.ndarray) -> torch.Tensor:
        return sft_loss(engine.model, [EXAMPLES[i] for i in examples], pad_id=0, device="cpu")[0]

    lengths = np.array([e.num_tokens for e in EXAMPLES])
    steps = train(
        engine,
        loss_of,
        lengths=lengths,
        units=np.array([len(e.response_ids) for e in EXAMPLES]),
        batch_size=4,
        micro_batch_size=2,
        start_step=start,
        total_steps=end,
        seed=0,
    )
    return [loss for _, loss in steps]


def _plain_losses(base: str, training: PolicyTraining) -> list[float]:
    """The same steps in plain PyTorch, each in one pass: the mean over its tokens, clip, AdamW, linear schedule."""
    from mpo_ray.training.order import batch_indices

    model = CompletionModel(load_model(base)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=STEPS // 2, num_training_steps=STEPS)
    losses = []
    for step in range(STEPS):
        batch = batch_indices(step, num_examples=len(EXAMPLES), batch_size=4, seed=0)
        total, count = sft_loss(model, [EXAMPLES[i] for i in batch], pad_id=0, device="cpu")
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()) / count)
    return losses


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_takes_the_steps_of_plain_adamw(base: str, stage: int) -> None:
    training = _training(zero_stage=stage)
    losses = _losses(_engine(base, training), 0, STEPS)
    assert losses == pytest.approx(_plain_losses(base, training), abs=1e-4)
    assert losses[0] - losses[-1] > 0.1  # and they lead somewhere


@pytest.mark.parametrize("stage", [0, 3])
def test_activation_checkpointing_changes_memory_and_not_the_steps(base: str, stage: int) -> None:
    lora = {"zero_stage": stage, "lora": {"rank": 4}}
    kept, recomputed = (
        _losses(_engine(base, _training(**lora, gradient_checkpointing=on)), 0, STEPS) for on in (False, True)
    )
    assert recomputed == pytest.approx(kept, abs=1e-5)
    assert kept[0] - kept[-1] > 0.01


def test_the_seed_decides_how_adapters_start(base: str) -> None:
    """Whatever the global generator did before."""
    training = _training(lora={"rank": 4})

    def adapters(seed: int) -> list[torch.Tensor]:
        torch.rand(3)
        return [p for n, p in load_trainable(base, training, seed=seed).named_parameters() if "lora_A" in n]

    assert all(torch.equal(a, b) for a, b in zip(adapters(1), adapters(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(adapters(1), adapters(2), strict=True))


def test_bf16_learns_too(base: str) -> None:
    losses = _losses(_engine(base, _training(precision="bf16", zero_stage=1)), 0, STEPS)
    assert losses[0] - losses[-1] > 0.1


@pytest.mark.parametrize(
    "changes", [{}, {"zero_stage": 1}, {"zero_stage": 3}, {"zero_stage": 1, "lora": {"rank": 4, "dropout": 0.5}}]
)
def test_a_restored_engine_goes_on_as_the_unbroken_one(base: str, tmp_path: Path, changes: dict) -> None:
    training = _training(**changes)
    engine = _engine(base, training)
    _losses(engine, 0, 3)
    engine.save(tmp_path, step=3)
    expected = _losses(engine, 3, STEPS)
    restored = _engine(base, training)
    assert restored.load(tmp_path) == 3
    assert _losses(restored, 3, STEPS) == expected


def test_a_truncated_checkpoint_is_refused_by_name(base: str, tmp_path: Path) -> None:
    engine = _engine(base, _training())
    engine.save(tmp_path, step=0)
    victim = max((tmp_path / "state").iterdir(), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=rf"damaged: {victim.name} \(100 bytes\)"):
        read_checkpoint(tmp_path, world_size=1)


@pytest.mark.parametrize("damage", ["", '[{"step": 1', None])
def test_a_checkpoint_whose_history_is_damaged_is_refused(base: str, tmp_path: Path, damage: str | None) -> None:
    """As a machine may leave it that loses its power."""
    _engine(base, _training()).save(tmp_path, step=0)
    (tmp_path / MARK).write_text("[]")
    assert read_checkpoint(tmp_path, world_size=1) == []
    (tmp_path / MARK).unlink()
    if damage is not None:
        (tmp_path / MARK).write_text(damage)
    with pytest.raises(CheckpointError, match=r"damaged: history\.json"):
        read_checkpoint(tmp_path, world_size=1)


def test_a_checkpoint_of_fewer_workers_is_refused(base: str, tmp_path: Path) -> None:
    _engine(base, _training()).save(tmp_path, step=0)
    with pytest.raises(CheckpointError, match="no part of worker 1"):
        read_checkpoint(tmp_path, world_size=2)


def test_a_checkpoint_loads_from_a_path_with_glob_characters(base: str, tmp_path: Path) -> None:
    """DeepSpeed finds its files by a glob pattern: in `[1]` it would look for a directory named 1."""
    training, place = _training(), tmp_path / "runs [1]*"
    engine = _engine(base, training)
    _losses(engine, 0, 1)
    engine.save(place, step=1)
    assert _engine(base, training).load(place) == 1


def _job(run: Run, base: str) -> TrainingJob:
    return TrainingJob(
        name="helpful",
        inputs="0123456789abcdef",
        run_root=run.root,
        model=base,
        training=_training(),
        train_parts=[],
        heldout_parts=[],
        output="policies/helpful",
        seed=0,
    )


def test_a_trained_model_vouches_for_each_of_its_files(base: str, tmp_path: Path) -> None:
    """What is lost or changed afterwards is not taken for trained, and neither is what other inputs made."""
    run = Run(str(tmp_path), "run")
    job, tokenizer = _job(run, base), load_tokenizer(base)
    for name in ("model.safetensors", "tokenizer.json", "training.json"):
        for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(b"x" + path.read_bytes()[1:])):
            _export(_engine(base, job.training), run, job, tokenizer, {"inputs": job.inputs, "steps": 1})
            assert is_trained(run, job)
            assert not is_trained(run, job.model_copy(update={"inputs": "other"}))
            damage(run.local / "policies" / "helpful" / name)
            assert not is_trained(run, job), name


class _Barrier:
    """One at which this worker dies, after some that it passes."""

    def __init__(self, passes: int) -> None:
        self._left = passes

    def __call__(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt


def _save(run: Run, job: TrainingJob, engine: DeepSpeedEngine, step: int, barrier: _Barrier | None = None) -> None:
    with new_checkpoint(run, job, step, rank=0, barrier=barrier or _Barrier(2)) as directory:
        engine.save(directory, step=step)
        (directory / MARK).write_text("[]")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_checkpoint_that_was_being_written_is_passed_over(base: str, tmp_path: Path, elsewhere: bool) -> None:
    """Its mark is missing: the one before it is taken. The last two that are finished are kept."""
    run = Run(f"memory://{tmp_path}" if elsewhere else str(tmp_path), "run")
    job, engine = _job(run, base), _engine(base, _training())
    newest = "checkpoint_step_000000"
    assert checkpoints(run, job) == []
    for step in (9, 10, 11):
        _save(run, job, engine, step)
    assert {node.removeprefix(f"{job.directory}/{newest}")[:2] for node in run.files(job.directory)} == {"10", "11"}
    assert checkpoints(run, job) == [f"{newest}10", f"{newest}11"]
    with opened_checkpoint(run, job, f"{newest}11", leads=True, barrier=_Barrier(2)) as directory:
        assert read_checkpoint(directory, world_size=1) == []
        assert _engine(base, _training()).load(directory) == 11
    with pytest.raises(KeyboardInterrupt):
        _save(run, job, engine, 12, barrier=_Barrier(1))
    assert run.files(f"{job.directory}/{newest}12/state")
    assert checkpoints(run, job)[-1] == f"{newest}11"
    _save(run, job, engine, 12)
    assert checkpoints(run, job) == [f"{newest}11", f"{newest}12"]
    assert not [node for node in run.files("") if ".partial-" in node]


def test_a_machine_has_one_copy_of_a_checkpoint_until_its_workers_have_loaded_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of object storage: three workers of one machine. Each file is fetched once, and afterwards none is left.

    Neither is what one left that was killed meanwhile.
    """
    run = Run(f"memory://{tmp_path}", "run")
    job, name = _job(run, "base"), "checkpoint_step_00000003"
    for file in (MARK, "state/a.pt", "state/b.pt"):
        run.write_text(f"{job.directory}/{name}/{file}", file)
    fetched: list[str] = []
    get_file = run.filesystem.get_file
    monkeypatch.setattr(
        run.filesystem, "get_file", lambda path, *given: [fetched.append(Path(path).name), get_file(path, *given)]
    )
    meeting = threading.Barrier(3)

    def load(rank: int) -> dict[str, str]:
        with opened_checkpoint(run, job, name, leads=rank == 0, barrier=meeting.wait) as directory:
            assert directory.name == name
            return {p.name: p.read_text() for p in directory.rglob("*") if p.is_file()}

    with ThreadPoolExecutor(3) as threads:
        seen = list(threads.map(load, range(3)))
    assert seen == 3 * [{MARK: MARK, "a.pt": "state/a.pt", "b.pt": "state/b.pt"}]
    assert sorted(fetched) == ["a.pt", "b.pt", MARK]
    assert list(run.local.iterdir()) == []
    opened = opened_checkpoint(run, job, name, leads=True, barrier=_Barrier(1))
    (opened.__enter__() / "state" / "old").touch()
    with opened_checkpoint(run, job, name, leads=True, barrier=_Barrier(2)) as directory:
        assert not (directory / "state" / "old").exists()
    assert list(run.local.iterdir()) == []


def test_the_files_of_a_checkpoint_are_on_disk_before_its_mark(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So are their names, and the directories that hold these, for a machine may lose its power."""
    run = Run(str(tmp_path), "run")
    job = _job(run, base)
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    _save(run, job, _engine(base, _training()), 3)
    place = run.local / job.directory / "checkpoint_step_00000003"
    before = synced[: synced.index(MARK)]
    assert {path.name for path in place.rglob("*")} - {MARK} <= set(before)
    assert {"run", "training", Path(job.directory).name, place.name} <= set(before)
    assert synced[synced.index(MARK) :] == [MARK, place.name]


def test_the_checkpoints_of_an_earlier_version_are_gone_on_from(base: str, tmp_path: Path) -> None:
    """Ray Train wrote them, without a mark that came last: one that was being written is found damaged."""
    run = Run(str(tmp_path), "run")
    job = _job(run, base)
    place = run.local / job.directory
    engine = _engine(base, _training())
    names = [f"checkpoint_2026-11-30_12-00-0{step}.000000" for step in (1, 2, 3)]
    for step, name in enumerate(names):
        engine.save(place / name, step=step)
        (place / name / MARK).write_text("[]")
    (place / "checkpoint_manager_snapshot.json").write_text("damaged")
    newest = place / names[2] / "state"
    max(newest.iterdir(), key=lambda path: path.stat().st_size).unlink()  # it was being uploaded
    assert checkpoints(run, job) == names
    assert read_checkpoint(place / names[1], world_size=1) == []
    with pytest.raises(CheckpointError, match=r"\(missing\) is not what was written"):
        read_checkpoint(place / names[2], world_size=1)
    _save(run, job, engine, 3)
    assert checkpoints(run, job) == [names[2], "checkpoint_step_00000003"]


def test_exported_weights_are_the_trained_ones_at_every_stage(base: str, tmp_path: Path) -> None:
    """ZeRO 3 gathers what ZeRO 0 holds: saved and loaded, both give the same distribution."""
    states = []
    for stage in (0, 3):
        engine = _engine(base, _training(zero_stage=stage))
        _losses(engine, 0, STEPS)
        states.append(engine.full_state(trained_only=False))
    assert states[0].keys() == states[1].keys()
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-5) for name in states[0])
    before = load_model(base).state_dict()
    assert any((before[name] != states[0][name]).any() for name in states[0])


def test_the_configuration_holds_numbers_and_no_auto() -> None:
    config = deepspeed_config(_training(batch_size=8), world_size=2)
    assert config["gradient_accumulation_steps"] == 2
    assert "auto" not in str(config)
