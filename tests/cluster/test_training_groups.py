"""Trainings that share a group of workers: each gives what it gives alone, and a kill costs none of the others."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.train import RunConfig
from ray.train.torch import TorchTrainer
from rich.console import Console

from mpo_ray.cluster import training_group
from mpo_ray.cluster.deepspeed_engine import DeepSpeedEngine, prepare_sharded_loading
from mpo_ray.cluster.train import TrainingError, train_all
from mpo_ray.cluster.trainable import KeptBase
from mpo_ray.cluster.training_job import TrainingJob
from mpo_ray.config_training import PolicyTraining
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.training.sft import Example, sft_loss
from tests.cluster.small_trainings import small_job, small_run
from tests.tiny import tiny_llama, tiny_tokenizer

EXAMPLES = [Example([1, 7 + i], [7 + (3 * i + j) % 18 for j in range(3)]) for i in range(4)]
#: More than half of the test cluster's CPUs, so that one group of workers is all that there is room for.
WORKERS = {"cpus_per_worker": 2.5, "max_failures": 1}
NAMES = ("first", "second", "third")


# ---- the base that stays open ----------------------------------------------------------------------------------------


def _steps(kept: KeptBase, base: str, training: PolicyTraining, *, seed: int, rate: float) -> list[torch.Tensor]:
    """What is trained, after three steps; opened, trained and closed as a worker does it."""
    sharded = prepare_sharded_loading(training, world_size=1)
    model = kept.completion_model(base, training, seed=seed)
    settings = training.model_copy(update={"learning_rate": rate})
    engine = DeepSpeedEngine(model, settings, total_steps=3, device=torch.device("cpu"))
    del sharded
    engine.model.train()
    for step in range(3):
        torch.manual_seed(step)
        engine.backward(sft_loss(engine.model, EXAMPLES, pad_id=0, device="cpu")[0])
        engine.step()
    state = [tensor for _, tensor in sorted(engine.full_state(trained_only=True).items())]
    engine.close()
    kept.take_back(model, training)
    return state


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"zero_stage": 2, "lora": {"rank": 4, "dropout": 0.5}},
        {"zero_stage": 1, "precision": "bf16"},
        {"gradient_checkpointing": True},
        {"zero_stage": 3},
        {"lora": None},
    ],
    ids=str,
)
def test_what_was_trained_before_on_the_same_base_leaves_no_trace(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Bit by bit, with other adapters, another seed and another rate before. Full weights and ZeRO 3 open their own."""
    base = str(tiny_llama(tmp_path / "base", tiny_tokenizer(), seed=0))
    settings = {"lora": {"rank": 4}, "batch_size": 4, "micro_batch_size": 4, "warmup_share": 0.0, **changes}
    training = PolicyTraining.model_validate(settings)
    alone = _steps(KeptBase(), base, training, seed=0, rate=1e-2)
    kept = KeptBase()
    other = training.model_copy(update={"lora": training.lora and training.lora.model_copy(update={"rank": 8})})
    _steps(kept, base, other, seed=5, rate=0.1)
    opened = kept._base
    after = _steps(kept, base, training, seed=0, rate=1e-2)
    assert len(alone) == len(after) > 0
    assert all(torch.equal(a, b) for a, b in zip(alone, after, strict=True))
    assert kept._base is opened, "the base was opened again"
    assert (opened is None) == (training.lora is None or training.zero_stage == 3)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("changes", [{"lora": None}, {"lora": None, "zero_stage": 3}, {"zero_stage": 3}], ids=str)
def test_all_that_a_training_trains_alone_it_trains_after_one_of_adapters(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """PEFT freezes the base that it adapts: the next training, of all weights or in shards, opens its own.

    The adapters after that get a base again.
    """
    base = str(tiny_llama(tmp_path / "base", tiny_tokenizer(), seed=0))
    settings = {"lora": {"rank": 4}, "batch_size": 4, "micro_batch_size": 4, "warmup_share": 0.0}
    adapters = PolicyTraining.model_validate(settings)
    training = PolicyTraining.model_validate({**settings, **changes})
    alone = [_steps(KeptBase(), base, one, seed=0, rate=1e-2) for one in (adapters, training)]
    kept = KeptBase()
    together = [_steps(kept, base, one, seed=0, rate=1e-2) for one in (adapters, training, adapters, training)]
    for expected, after in zip([*alone, *alone], together, strict=True):
        assert len(expected) == len(after) > 0
        assert all(torch.equal(a, b) for a, b in zip(expected, after, strict=True))


@pytest.mark.usefixtures("process_group")
def test_adapters_that_were_taken_back_are_gone_from_memory(tmp_path: Path) -> None:
    base = str(tiny_llama(tmp_path / "base", tiny_tokenizer(), seed=0))
    training = PolicyTraining.model_validate({"lora": {"rank": 4}, "batch_size": 4, "micro_batch_size": 4})
    kept = KeptBase()
    model: CompletionModel | None = kept.completion_model(base, training, seed=0)
    engine = DeepSpeedEngine(model, training, total_steps=3, device=torch.device("cpu"))
    watched = [weakref.ref(p) for n, p in model.named_parameters() if "lora_" in n]
    engine.close()
    kept.take_back(model, training)
    model = engine = None  # type: ignore[assignment]
    gc.collect()
    assert watched
    assert not [one for one in watched if one() is not None]
    assert not [name for name, _ in kept._base.named_modules() if "lora" in name]


# ---- groups on Ray Train ---------------------------------------------------------------------------------------------


def _policy_jobs(root: Path, *, names: Sequence[str] = NAMES, **changes: object) -> list[TrainingJob]:
    """One DPO training for each name, on pairs of its own."""
    small_run(root)
    for number, name in enumerate(names):
        rows = [
            {
                "id": str(i),
                "prompt_ids": [1, 7 + i],
                "chosen_ids": [8 + number, 9, 2],
                "rejected_ids": [10, 11 + number, 12, 2],
                "log_ref_chosen": -9.0,
                "log_ref_rejected": -12.0,
                "weight": 1.0,
            }
            for i in range(12)
        ]
        (root / "pairs" / name).mkdir(parents=True)
        for side in ("train", "heldout"):
            pq.write_table(pa.Table.from_pylist(rows), root / "pairs" / name / f"{side}-00000.parquet")
    settings = {
        "batch_size": 4,
        "micro_batch_size": 4,
        "epochs": 4,
        "checkpoint_every": 2,
        "learning_rate": 0.01,
        "lora": {"rank": 4, "dropout": 0.1},
        "workers": WORKERS,
        **changes,
    }
    return [
        small_job(root, name).model_copy(
            update={
                "training": PolicyTraining.model_validate(settings),
                "train_parts": [f"pairs/{name}/train-00000.parquet"],
                "heldout_parts": [f"pairs/{name}/heldout-00000.parquet"],
            }
        )
        for name in names
    ]


def _contents(root: Path) -> dict[str, bytes]:
    """Everything that the trainings leave, but for TensorBoard's files, which hold times."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted((root / "policies").rglob("*")) if p.is_file()}


def _watched(values: dict[str, Any]) -> None:
    """Note each opening of a base and each begin of a training, with its process; kill the second one's first try."""
    from mpo_ray.cluster import train_worker, trainable

    root = Path(next(iter(values["jobs"].values()))["run_root"])
    open_base, one, checkpoint = trainable.open_base, train_worker.train_worker, train_worker._checkpoint

    def note(what: str) -> None:
        with (root / "notes").open("a") as file:
            file.write(f"{what} {os.getpid()}\n")

    def opened(*given: Any) -> Any:
        note("opens")
        return open_base(*given)

    def trained(job: TrainingJob, *given: Any) -> str | None:
        note(job.name)
        return one(job, *given)

    def saved(engine: Any, task: Any, run: Any, job: TrainingJob, step: int, history: Any) -> None:
        checkpoint(engine, task, run, job, step, history)
        if (root / "deadly").exists() and job.name == "second" and step == 4:
            (root / "deadly").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if (root / "no board").exists() and job.name == "second" and step == 4:
            (root / "no board").unlink()
            ray.kill(values["board"])

    trainable.open_base, train_worker.train_worker, train_worker._checkpoint = opened, trained, saved
    train_worker.train_on_worker(values)


def test_ray_train_starts_no_process_for_data_sets_that_no_training_has(ray_cluster: None, tmp_path: Path) -> None:
    """By a method of Ray Train's own, so a version that does it otherwise is noticed here."""
    config: dict[str, Any] = {"run_config": RunConfig(name="a", storage_path=str(tmp_path))}
    usual, ours = (
        {type(one).__name__ for one in kind(print, **config)._create_default_callbacks()}
        for kind in (TorchTrainer, training_group.Trainer)
    )
    assert usual - ours == {"DatasetsCallback"}
    assert ours < usual


@pytest.mark.slow
def test_one_group_does_all_trainings_each_as_if_it_were_alone(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes in every file. One process, which opens the base once; after a kill another goes on,
    and after one of the process that hands the trainings out.

    What was finished before the kill is not done again, and what was interrupted goes on from its checkpoint: its
    history has no step twice.
    """
    assert ray.cluster_resources()["CPU"] == 4
    monkeypatch.setattr(training_group, "train_on_worker", _watched)
    jobs = _policy_jobs(tmp_path)
    train_all(jobs, Console())
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    assert [what for what, _ in notes] == ["first", "opens", "second", "third"]
    assert len({process for _, process in notes}) == 1
    together = _contents(tmp_path)
    assert {name.split("/")[1] for name in together} == set(NAMES)

    for directory in ("policies", "training"):
        shutil.rmtree(tmp_path / directory)
    train_all(jobs[2:], Console())
    alone = _contents(tmp_path)
    assert alone == {name: content for name, content in together.items() if name in alone}
    assert alone

    for directory in ("policies", "training"):
        shutil.rmtree(tmp_path / directory)
    (tmp_path / "notes").unlink()
    (tmp_path / "deadly").touch()
    train_all(jobs, Console())
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    assert [what for what, _ in notes] == ["first", "opens", "second", "second", "opens", "third"]
    assert len({process for _, process in notes}) == 2
    assert _contents(tmp_path) == together

    for directory in ("policies", "training"):
        shutil.rmtree(tmp_path / directory)
    (tmp_path / "notes").unlink()
    (tmp_path / "no board").touch()
    train_all(jobs, Console())
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    assert [what for what, _ in notes if what != "opens"] == ["first", "second", "second", "third"]
    assert _contents(tmp_path) == together


@pytest.mark.slow
def test_two_workers_do_trainings_of_every_form_in_any_order(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters and all weights, whole and in the shards of ZeRO 3: the same bytes, whatever was trained before."""
    monkeypatch.setattr(training_group, "train_on_worker", _watched)
    lora = {"rank": 4, "dropout": 0.1}
    forms = {
        "adapters": {"lora": lora, "zero_stage": 2},
        "weights": {"lora": None},
        "sharded-adapters": {"lora": lora, "zero_stage": 3},
        "sharded-weights": {"lora": None, "zero_stage": 3},
    }
    workers = {"num_workers": 2, "cpus_per_worker": 1.5, "max_failures": 0}  # two of these, and no room for others
    jobs = _policy_jobs(tmp_path, names=list(forms), epochs=1, micro_batch_size=2, workers=workers)
    settings = [{**job.training.model_dump(), **forms[job.name]} for job in jobs]
    jobs = [
        job.model_copy(update={"training": PolicyTraining.model_validate(its)})
        for job, its in zip(jobs, settings, strict=True)
    ]
    found = []
    for order in (jobs, jobs[::-1]):
        train_all(order, Console())
        notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
        (tmp_path / "notes").unlink()
        by_process = {process: [what for what, its in notes if its == process] for _, process in notes}
        assert len(by_process) == 2
        for whats in by_process.values():
            assert [what for what in whats if what != "opens"] == [job.name for job in order]
        found.append(_contents(tmp_path))
        for directory in ("policies", "training"):
            shutil.rmtree(tmp_path / directory)
    assert {name.split("/")[1] for name in found[0]} == forms.keys()
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a remark; the end is the same."""
    jobs = _policy_jobs(tmp_path)[:1]
    train_all(jobs, Console())
    expected = _contents(tmp_path)
    shutil.rmtree(tmp_path / "policies")
    before, newest = sorted((tmp_path / jobs[0].directory).iterdir())
    assert (before.name[-2:], newest.name[-2:]) == ("10", "12")
    [victim] = (newest / "state").glob("mp_rank_00*")
    victim.write_bytes(victim.read_bytes()[:100])
    capsys.readouterr()
    train_all(jobs, Console())
    told = capsys.readouterr().out
    assert f"  first: the checkpoint {newest.name} is damaged: {victim.name} (100 bytes) is not what was wri" in told, (
        told
    )
    assert " It goes on from the one before, of step 10.\n" in told
    assert _contents(tmp_path) == expected


@pytest.mark.slow
def test_a_training_that_cannot_begin_is_given_up_and_the_next_of_its_group_is_done(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = _policy_jobs(tmp_path, workers={**WORKERS, "max_failures": 0})
    jobs[0] = jobs[0].model_copy(update={"train_parts": ["pairs/missing.parquet"]})
    with pytest.raises(TrainingError, match=r"first: .*missing\.parquet") as raised:
        train_all(jobs[:2], Console())
    assert len(str(raised.value).splitlines()) == 2
    assert "  first failed, and second go on: " in capsys.readouterr().out
    assert (tmp_path / "policies" / "second" / "training.json").is_file()
    assert not (tmp_path / "policies" / "first").exists()
