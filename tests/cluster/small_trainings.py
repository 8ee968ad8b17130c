"""Trainings of a few steps on a tiny model, as jobs of a run."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mpo_ray.cluster.training_job import TrainingJob
from mpo_ray.config_training import Source, SupervisedTraining
from tests.tiny import tiny_llama, tiny_tokenizer

NUM_TEXTS = 12


def small_run(root: Path) -> Path:
    """A run directory with a model and a few texts."""
    tiny_llama(root / "model", tiny_tokenizer(), seed=0)
    (root / "config.yaml").write_text("{}")
    (root / "texts").mkdir()
    texts = [{"prompt_ids": [1, 7 + i], "response_ids": [8, 9, 2]} for i in range(NUM_TEXTS)]
    for side in ("train", "heldout"):
        pq.write_table(pa.Table.from_pylist(texts), root / "texts" / f"{side}-00000.parquet")
    return root


def small_job(root: Path, name: str, **training: object) -> TrainingJob:
    """A training of three steps, unless its settings say otherwise."""
    settings = {"batch_size": 4, "micro_batch_size": 4, "workers": {"max_failures": 0}, **training}
    return TrainingJob(
        name=name,
        inputs="0" * 64,
        run_root=str(root),
        model=str(root / "model"),
        training=SupervisedTraining.model_validate({"source": Source(embedded="corpus"), **settings}),
        train_parts=["texts/train-00000.parquet"],
        heldout_parts=["texts/heldout-00000.parquet"],
        output=f"policies/{name}",
        seed=0,
    )
