"""What a training loop needs of the machine it runs on: forward is the model's own, backward and step the engine's."""

from __future__ import annotations

from typing import Protocol

import torch

from mpo_ray.policies.completion_model import CompletionModel


class Engine(Protocol):
    """One data-parallel worker. `step` updates the weights on every `accumulation`-th call and is a no-op between."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def model(self) -> CompletionModel: ...

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of `loss`; the engine divides by the number of accumulated calls."""

    def step(self) -> None: ...

    def gradient_norm(self) -> float:
        """Norm of the last step's gradient, before it is clipped, over all workers; not finite where that is not."""

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Average of `values` over the workers. Collective."""
