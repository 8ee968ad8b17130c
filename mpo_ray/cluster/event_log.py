"""Figures of a training run as TensorBoard events in the run directory: `tensorboard --logdir <run>/tensorboard`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from tensorboardX import SummaryWriter

from mpo_ray.run import Run


class EventLog:
    """An event file under `tensorboard/<job>`, written as the figures come.

    Where the run directory is no directory of this machine, the file is kept here and sent there whole, each time.
    """

    def __init__(self, run: Run, job: str, *, start: int) -> None:
        """start: the step that training goes on from; what an earlier file says of later ones no longer counts.

        At 0 training begins anew, and the files of an earlier one are removed.
        """
        self._run, self._node = run, f"tensorboard/{job}"
        self._directory = run.local / self._node
        if start == 0:
            run.remove(self._node)
            shutil.rmtree(self._directory, ignore_errors=True)  # the copy here, where storage is elsewhere
        self._writer = SummaryWriter(
            str(self._directory),
            purge_step=start + 1 if start else None,
            filename_suffix=f".{start}",  # without it, two files of the same second would be one
        )

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
