"""A step's gradient is that of Σ losses / Σ units over the step, however its batch is cut into forward passes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mpo_ray.maths.constrained import ratio
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.policies.loading import load_model
from mpo_ray.run import Run
from mpo_ray.training.constrained import Candidates, cloning_loss, pool_of, token_batch
from mpo_ray.training.loop import NonFiniteError
from mpo_ray.training.preference import Pair, preference_loss
from mpo_ray.training.sft import Example, sft_loss
from tests.cluster.step_gradients import BATCH, KINDS, WORLD, job_of, take_step, write_parts
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.tiny_run import ROOT, environment
from tests.training.candidates import PROBLEM

MICRO_BATCH_SIZES = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("base"), tiny_tokenizer(), seed=0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    found = Run(str(tmp_path_factory.mktemp("runs")), "run")
    write_parts(found)
    return found


@pytest.fixture(scope="module")
def whole(base: str, run: Run) -> dict[str, tuple[float, torch.Tensor]]:
    """Loss and gradient of the whole batch in one pass of plain PyTorch, by kind of training."""
    found = {}
    for kind in KINDS:
        model = CompletionModel(load_model(base))
        rows = pq.read_table(run.fetch(f"parts/{kind}.parquet")).to_pylist()
        loss = _whole_loss(kind, model, rows)
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found[kind] = float(loss.detach()), torch.cat(gradients)
    return found


def _whole_loss(kind: str, model: CompletionModel, rows: list[dict]) -> torch.Tensor:
    if kind == "sft":
        texts = [Example(row["prompt_ids"], row["response_ids"]) for row in rows]
        total, num_tokens = sft_loss(model, texts, pad_id=0, device="cpu")
        return total / num_tokens
    if kind == "mopo":
        batch = [Candidates.of_row(row, num_secondary=2) for row in rows]
        pool = pool_of(batch)
        return cloning_loss(model(token_batch(batch, pad_id=0)), pool, ratio(pool, np.zeros(2), PROBLEM.tau))
    pairs = [Pair(**{key: value for key, value in row.items() if key != "id"}) for row in rows]
    how = {"beta": 0.5, "length_normalized": kind == "ipo", "pad_id": 0, "device": "cpu"}
    return preference_loss(model, pairs, loss=kind, **how).losses.mean()  # type: ignore[arg-type]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_gradient_does_not_depend_on_the_size_of_a_forward_pass(
    base: str, run: Run, whole: dict[str, tuple[float, torch.Tensor]], kind: str
) -> None:
    """∇ Σ_i loss_i / Σ_i units_i over the step, for forward passes of 1, 2, 4 and 8 examples."""
    loss, gradient = whole[kind]
    for size in MICRO_BATCH_SIZES:
        found, steps = take_step(run, job_of(kind, run, base, size, 1))
        assert found == pytest.approx(loss, rel=1e-5), size
        torch.testing.assert_close(steps, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.fixture(scope="module")
def on_two_workers(base: str, run: Run) -> list[dict]:
    """What each of two workers found."""
    program = [sys.executable, "-m", "tests.cluster.step_gradients", base, run.root]
    workers = [
        subprocess.Popen(
            [*program, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
            cwd=ROOT,
        )
        for rank in range(WORLD)
    ]
    try:
        printed = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * WORLD, "\n".join(printed)
    return [torch.load(Path(run.root) / f"found-{rank}.pt") for rank in range(WORLD)]


@pytest.mark.slow
def test_the_gradient_does_not_depend_on_the_number_of_workers(
    on_two_workers: list[dict], whole: dict[str, tuple[float, torch.Tensor]]
) -> None:
    """As many tokens on one worker as on the other would be a coincidence."""
    for kind, (loss, gradient) in whole.items():
        for found, steps in (worker[kind] for worker in on_two_workers):
            assert found == pytest.approx(loss, rel=1e-5), kind
            torch.testing.assert_close(steps, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.slow
def test_every_worker_stops_at_a_loss_that_is_not_finite_with_the_step_and_the_rows(on_two_workers: list[dict]) -> None:
    """Of four forward passes over both workers, the one with the bad pair is named, by both alike."""
    first, second = (worker["stopped"] for worker in on_two_workers)
    assert first == second
    assert len(first) == 3
    for reason in first:
        assert reason.startswith("step 1: the loss is not finite in the forward pass of pair ")
        named = reason.partition(". Look")[0].partition("forward pass of ")[2].split(", ")
        assert "pair 'p5'" in named
        assert len(named) == 2


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_stops_at_a_loss_that_is_not_finite(base: str, run: Run, stage: int, precision: str) -> None:
    """DeepSpeed by itself leaves such a step out and goes on, or makes every weight NaN."""
    job = job_of("dpo", run, base, 1, 1, part="nan", zero_stage=stage, precision=precision)
    with pytest.raises(NonFiniteError, match=r"step 1: the loss is not finite in the forward pass of pair 'p5'\. Look"):
        take_step(run, job)


@pytest.mark.usefixtures("process_group")
def test_training_stops_at_a_gradient_that_is_not_finite(base: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss may be finite where its gradient is not: here the slope of a square root at 0."""
    from mpo_ray.cluster.tasks import SupervisedTask

    usual = SupervisedTask.loss
    monkeypatch.setattr(
        SupervisedTask, "loss", lambda self, examples: usual(self, examples) + (0 * usual(self, examples)).sqrt()
    )
    with pytest.raises(NonFiniteError, match="step 1: the gradient's norm is not finite after the rows the text '<s>"):
        take_step(run, job_of("sft", run, base, BATCH, 1))
