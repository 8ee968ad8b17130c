"""One training run as a record that travels to its workers: what to train, on what, and where the result goes."""

from __future__ import annotations

from mpo_ray.config import PolicyTraining, Strict, SupervisedTraining


class TrainingJob(Strict):
    """`name` with `identity` names the Ray Train run, so that other inputs never resume it.

    model: directory or hub id to start from; *_parts: Parquet files of the run; output: node of the run to publish.
    """

    name: str
    identity: str
    run_root: str
    model: str
    training: PolicyTraining | SupervisedTraining
    train_parts: list[str]
    heldout_parts: list[str]
    output: str
    seed: int

    @property
    def directory(self) -> str:
        """Node of the run that holds the checkpoints."""
        return f"training/{self.name}-{self.identity}"
