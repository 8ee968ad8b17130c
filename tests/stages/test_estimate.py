"""The arithmetic of `check`'s estimates, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mpo_ray.config import RunConfig
from mpo_ray.data.lengths import Spread
from mpo_ray.stages import estimate
from mpo_ray.stages.check_estimate import Estimates, duration, model_shape, size
from mpo_ray.stages.estimate import Need, Shape, Speeds
from mpo_ray.stages.estimate_stages import Estimator, Table, Tables
from tests.tiny import tiny_llama, tiny_tokenizer

SHAPE = Shape(parameters=1000, adapter=100, layers=2, hidden=10, inner=20, kv_width=5, vocabulary=50)
SPEEDS = Speeds(adapt=0.01, train=0.02, forward=0.001, step=1.0, decode=0.1)


@pytest.mark.parametrize(
    ("total", "trained", "precision", "zero", "workers", "weights", "optimiser"),
    [
        (1000, 1000, "fp32", 0, 1, 4000, 1000 * 4 + 1000 * 8),
        (1100, 100, "fp32", 0, 1, 4400, 100 * 4 + 100 * 8),
        (1100, 100, "bf16", 0, 1, 2200, 100 * 2 + 100 * (8 + 4)),
        (1000, 1000, "fp32", 1, 4, 4000, 1000 * 4 + 1000 * 12 // 4),
        (1000, 1000, "fp32", 2, 4, 4000, 1000 * 4 // 4 + 1000 * 12 // 4),
        (1000, 1000, "fp32", 3, 4, 1000, 1000 * 4 // 4 + 1000 * 12 // 4),
    ],
)
def test_the_state_of_a_training_is_weights_gradients_and_moments(
    total: int, trained: int, precision: str, zero: int, workers: int, weights: int, optimiser: int
) -> None:
    found = estimate.training_state(total, trained, precision=precision, zero_stage=zero, num_workers=workers)
    assert found == {"weights": weights, "optimiser": optimiser}


def test_what_a_batch_takes() -> None:
    """A layer keeps 11 × 10 + 4 × 20 = 190 values of a token; with checkpointing its input, and one layer is whole."""
    kept = estimate.kept_activations
    assert kept(SHAPE, 3, precision="fp32", checkpointing=False) == 3 * 2 * 190 * 4
    assert kept(SHAPE, 3, precision="fp32", checkpointing=True) == 3 * (2 * 10 + 190) * 4
    assert estimate.passing_activations(SHAPE, 3, precision="bf16") == 3 * 190 * 2
    assert estimate.cache(SHAPE, 4, 8, precision="fp32") == 4 * 8 * 2 * 2 * 5 * 4
    assert estimate.logits(SHAPE, 3, copies=2) == 3 * 50 * 4 * 2


def test_a_checkpoint_has_what_is_trained_its_moments_and_its_fp32_copy() -> None:
    assert estimate.checkpoint(100, precision="fp32", zero_stage=0) == 100 * (4 + 8)
    assert estimate.checkpoint(100, precision="fp32", zero_stage=1) == 100 * (4 + 8 + 4)
    assert estimate.checkpoint(100, precision="bf16", zero_stage=0) == 100 * (2 + 8 + 4)


def test_jobs_that_have_no_room_beside_each_other_take_turns() -> None:
    """Three jobs, two at a time: one start, and two rounds of work, which both workers share."""
    found = estimate.training_seconds(
        3, 2, train_tokens=1000, heldout_tokens=100, num_workers=2, step=0.02, forward=0.001
    )
    assert found == 35.0 + 2 * (20.0 + 0.1) / 2
    tokens = {"forward_tokens": 1000, "decoded_tokens": 20, "decoded_steps": 3}
    assert estimate.actor_seconds(**tokens, num_actors=3, speeds=SPEEDS) == 12.0 + (1.0 + 2.0 + 3.0) / 3


@pytest.mark.parametrize("rank", [None, 4])
def test_kept_activations_are_about_what_pytorch_keeps(tmp_path: Path, rank: int | None) -> None:
    """The values that autograd saves for the backward pass, each memory once, without weights: within a factor of 2."""
    path = str(tiny_llama(tmp_path / "model", tiny_tokenizer(), seed=0))
    lora = None if rank is None else {"rank": rank}
    shape = model_shape(config(path, policies={"lora": lora}), path)
    model = AutoModelForCausalLM.from_pretrained(path).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []  # so that no memory is used twice
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held.append(model(input_ids=torch.ones(4, 32, dtype=torch.long), use_cache=False).logits)
    found = sum(saved.values())
    expected = estimate.kept_activations(shape, 4 * 32, precision="fp32", checkpointing=False)
    assert 0.5 < found / expected < 2.0
    adapted = 2 * rank * (4 * 32 + 2 * (32 + 16) + 3 * (32 + 64)) // 2 if rank is not None else 0
    assert shape.adapter == _adapter_parameters(rank) if rank is not None else shape.adapter == adapted == 0


def _adapter_parameters(rank: int | None) -> int:
    """Of 2 layers: rank × (inputs + outputs) of q, k, v, o, gate, up and down."""
    sizes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    return 2 * sum((rank or 0) * (inputs + outputs) for inputs, outputs in sizes)


def config(model: str = "model", **sections: object) -> RunConfig:
    source = {"preferences": {"path": "pairs.jsonl"}}
    values = {"name": "x", "reference": {"model": model}, "objectives": {"helpful": source, "kind": source}}
    return RunConfig.model_validate(values | sections)


def estimator(**sections: object) -> Estimator:
    table = Table(64, 16, Spread(10, 10, 10, 10.0), Spread(5, 5, 5, 5.0), Spread(15, 15, 15, 15.0))
    tables = Tables({"helpful": table, "kind": table}, table, fit=8, evaluation=4)
    side_by_side = {"policies": 1, "reference.sft": 1, "mopo.training": 1}
    return Estimator(config(**sections), SHAPE, tables, SPEEDS, side_by_side)


def test_every_stage_is_its_tokens_times_their_seconds() -> None:
    """Two objectives, each 64 pairs to learn from and 16 held out; prompts of 10 tokens and replies of 5.

    pairs: 2 × 80 × 2 × 15 tokens are read. policies: 2 steps of 32 pairs of 30 tokens, twice, and 16 held-out pairs.
    All prompts are one part, which is decoded for 5 steps, for each proposal, step of the fit, or candidate.
    samples: 8 prompts × 3 proposals × 4 answers of 5 tokens are drawn; prompts are read to draw and to score.
    scores: the same under 2 policies. fit: 10 steps of 8 prompts × 2 answers of 2 policies' rows, scored by 3 models.
    evaluation: 7 candidates of 1, 1, 1, 2, 1, 1, 2 rows answer 4 prompts; 6 are compared with the reference.
    """
    seconds = {need.stage: need.seconds for need in estimator().needs()}
    assert seconds == pytest.approx(
        {
            "pairs": 12 + 4800 * 0.001,
            "policies": 35 + 2 * (2 * 32 * 30 * 0.01 + 16 * 30 * 0.001),
            "samples": 12 + 3 * 5 * 1.0 + 480 * 0.1 + (2 * 240 + 480) * 0.001,
            "scores": 12 + 2 * (240 + 480) * 0.001,
            "fit": 12 + 5 + 10 * 5 * 1.0 + 1600 * 0.1 + (1600 + 3 * 160 * 5) * 0.001,
            "evaluation": 12 + 8 + 7 * 5 * 1.0 + 9 * 4 * 5 * 0.1 + (9 * 4 * 10 + 2 * 14 * (4 * 10 + 4 * 5)) * 0.001,
        }
    )


def test_the_memory_of_a_stage_is_the_sum_of_its_parts() -> None:
    """policies: a micro-batch of 8 pairs has 16 rows of 15 tokens, whose logits stand twice. samples: 32 × 4 rows."""
    needs = {need.stage: need for need in estimator().needs()}
    policies = needs["policies"]
    assert policies.memory == {
        "process": estimate.TRAINING_PROCESS,
        "weights": 1100 * 4,
        "optimiser": 100 * 12,
        "activations": 240 * 2 * 190 * 4 * 3 // 2 + 80 * 50 * 4 * 2,
    }
    assert policies.bytes_each == sum(policies.memory.values())
    assert policies.disk == 2 * (100 * 4 + 3 * 1200)
    assert needs["samples"].memory == {
        "process": estimate.ACTOR_PROCESS,
        "weights": 1000 * 4,
        "adapters": 2 * 100 * 4,
        "activations": 480 * 190 * 4 + 480 * 50 * 4,
        "cache": 128 * (10 + 128) * 2 * 2 * 5 * 4 + 128 * 50 * 4 * 3,
    }


def test_whole_policies_are_copies_of_the_reference() -> None:
    needs = {need.stage: need for need in estimator(policies={"lora": None}).needs()}
    assert needs["policies"].memory["weights"] == 1000 * 4
    assert needs["policies"].memory["optimiser"] == 1000 * 12
    assert needs["samples"].memory["weights"] == 3 * 1000 * 4
    assert needs["pairs"].memory["weights"] == 1000 * 4


def test_sft_and_mopo_are_stages_of_their_own() -> None:
    sft = {"model": "model", "sft": {"source": {"path": "texts.jsonl"}}}
    mopo = {"problems": {"kind": {"primary": "kind"}}}
    needs = {need.stage: need for need in estimator(reference=sft, mopo=mopo).needs()}
    assert list(needs) == ["reference", "pairs", "policies", "samples", "scores", "fit", "mopo", "evaluation"]
    assert needs["reference"].seconds == pytest.approx(35 + 2 * 32 * 15 * 0.02 + 16 * 15 * 0.001)
    # 7 prompts of 12 candidates each make one step of 16
    assert needs["mopo"].seconds == pytest.approx(35 + 16 * 12 * 15 * 0.01 + 1 * 12 * 15 * 0.001)


NEED = Need(
    "policies",
    60.0,
    {"process": 10, "weights": 30, "activations": 60},
    2,
    1000,
    {"weights": "set policies.precision: bf16", "activations": "lower X", "processes": "raise Y"},
)


def test_a_stage_that_does_not_fit_is_named_with_the_setting_that_lowers_it() -> None:
    """One of 100 bytes fits into 150, two do not; where one does not fit, its largest part counts."""
    assert NEED.remedy(200) is None
    assert NEED.remedy(150) == "raise Y"
    assert NEED.remedy(150, num_nodes=2) is None
    assert NEED.remedy(99) == "lower X"
    assert Estimates([NEED], 200, 1000, 1, "").cautions() == []
    [memory, disk] = Estimates([NEED], 150, 999, 1, "").cautions()
    assert memory.startswith("policies: holds about 2 × ")
    assert memory.endswith("To lower it: raise Y.")
    assert disk.startswith("storage: the run leaves about ")


def test_a_stage_on_gpus_is_compared_with_one_gpu() -> None:
    """Each process has its own, for its 90 bytes beside the process. Without a GPU here nothing is said."""
    need = replace(NEED, on_gpu=True)
    assert need.remedy(90) is None
    assert need.remedy(89) == "lower X"
    [caution] = Estimates([need], 10, 1000, 1, "", free_gpu=89).cautions()
    assert "are free on a GPU of this machine. To lower it: lower X." in caution
    assert Estimates([need], 10, 1000, 1, "").cautions() == []
    needs = estimator(policies={"workers": {"gpus_per_worker": 1}}, scoring={"gpus_per_actor": 0.5}).needs()
    assert all(need.on_gpu for need in needs)
    assert not any(need.on_gpu for need in estimator().needs())


def test_sizes_and_durations_are_rounded_for_people() -> None:
    assert [size(n) for n in (10, 1.24e6, 689e6, 1.5e9, 123e9)] == ["< 1 MB", "1.2 MB", "689 MB", "1.5 GB", "123 GB"]
    assert [duration(s) for s in (None, 3.4, 89, 200, 7200)] == ["–", "3 s", "89 s", "3 min", "2.0 h"]
