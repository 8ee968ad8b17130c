"""Figures of a training run as TensorBoard events in the run directory: `tensorboard --logdir <run>/tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping

from tensorboardX import SummaryWriter

from mpo_ray.run import Run


class EventLog:
    """An event file under `tensorboard/<job>`, written as the figures come.

    Where the run directory is no directory of this machine, the file is kept here and sent there whole, each time.
    """

    def __init__(self, run: Run, job: str, *, start: int) -> None:
        """start: the step that training goes on from; what an earlier file says of later ones no longer counts."""
        self._run, self._node = run, f"tensorboard/{job}"
        self._directory = run.local / self._node
        self._writer = SummaryWriter(str(self._directory), purge_step=start + 1 if start else None)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._send()

    def close(self) -> None:
        self._writer.close()
        self._send()

    def _send(self) -> None:
        if not self._run.is_local:
            for path in self._directory.iterdir():
                self._run.write_bytes(f"{self._node}/{path.name}", path.read_bytes())
