"""One worker that is the whole of it: AdamW in this process, for training that needs no cluster."""

from __future__ import annotations

import torch
from transformers import get_scheduler

from mpo_ray.policies.completion_model import CompletionModel

#: Gradients longer than this are shortened to it.
MAX_GRADIENT_NORM = 1.0
WARMUP_SHARE = 0.1


class LocalEngine:
    """The `training.engine.Engine` of one process: the learning rate rises over a tenth of the steps, then falls to 0.

    accumulation: backward passes of one optimiser step
    """

    rank, world_size = 0, 1

    def __init__(self, model: CompletionModel, *, learning_rate: float, total_steps: int, accumulation: int) -> None:
        self.model = model
        self.device: torch.device = next(model.parameters()).device
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=learning_rate, weight_decay=0.0)
        warmup = round(WARMUP_SHARE * total_steps)
        self._schedule = get_scheduler(
            "linear", self._optimizer, num_warmup_steps=warmup, num_training_steps=total_steps
        )
        self._accumulation, self._passes = accumulation, 0
        self._norm = torch.zeros(())

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self._accumulation).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        self._passes += 1
        if self._passes % self._accumulation:
            return
        self._norm = torch.nn.utils.clip_grad_norm_(self._trained, MAX_GRADIENT_NORM)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()

    def gradient_norm(self) -> float:
        return float(self._norm)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return values
