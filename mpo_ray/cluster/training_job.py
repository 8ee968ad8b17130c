"""One training run as a record that travels to its workers: what to train, on what, and where the result goes."""

from __future__ import annotations

from mpo_ray.config_training import ConstrainedTraining, PolicyTraining, Strict, SupervisedTraining
from mpo_ray.training.constrained import Problem

#: Node of the run that holds the checkpoints of all trainings.
CHECKPOINTS = "training"


class TrainingJob(Strict):
    """`inputs`, the digest of everything that the result depends on, names the Ray Train run with `name`, so that other
    inputs never resume it, and stays in the result's training.json.

    model: directory or hub id to start from; *_parts: Parquet files of the run; output: node of the run to publish.
    section: where the settings of the training are in the run file
    problem: what constrained training maximises and bounds; None for the other kinds
    """

    name: str
    inputs: str
    run_root: str
    model: str
    training: PolicyTraining | ConstrainedTraining | SupervisedTraining
    problem: Problem | None = None
    train_parts: list[str]
    heldout_parts: list[str]
    output: str
    seed: int
    section: str = "policies"

    @property
    def directory(self) -> str:
        """Node of the run that holds the checkpoints."""
        return checkpoint_directory(self.name, self.inputs)

    @property
    def error_log(self) -> str:
        """Node of the run for the traceback of an error."""
        return f"{self.directory}/error.txt"

    @property
    def run_name(self) -> str:
        """Name of the Ray Train run."""
        return self.directory.removeprefix(f"{CHECKPOINTS}/")


def checkpoint_directory(name: str, inputs: str) -> str:
    """Node of the run that holds the checkpoints of a training, by its name and the digest of its inputs."""
    return f"{CHECKPOINTS}/{name}-{inputs[:12]}"
