"""A policy and what it was some steps ago: two sets of weights behind one forward pass (design 2.4, eq. 13).

Knows nothing of when one is copied to the other, nor of how they are sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mpo_ray.config_training import ConstrainedTraining, Training
from mpo_ray.data.tokens import TokenBatch
from mpo_ray.policies.completion_model import CompletionModel

#: Names of the adapter that is trained and of the lagged one.
TRAINED, LAGGED = "default", "lagged"


def keeps_lagged(training: Training) -> bool:
    """Whether a run compares with what its policy was."""
    return isinstance(training, ConstrainedTraining) and training.method == "online" and training.lag is not None


def add_lagged_adapter(causal_lm: Any) -> None:
    """Put a second, frozen adapter of the same form beside the one that is trained."""
    causal_lm.add_adapter(LAGGED, causal_lm.peft_config[TRAINED])
    for _, parameter in _adapter(causal_lm, LAGGED):
        parameter.requires_grad_(False)


class LaggedModel(CompletionModel):
    """A policy whose lagged weights are a second adapter on the same base, or a frozen model where all are trained."""

    def __init__(self, causal_lm: Any, lagged_lm: Any | None = None) -> None:
        super().__init__(causal_lm)
        self.lagged = None if lagged_lm is None else CompletionModel(lagged_lm.requires_grad_(False))

    def forward(
        self,
        batch: TokenBatch,
        *,
        length_normalized: bool = False,
        weights: Literal["trained", "lagged"] = "trained",
    ) -> torch.Tensor:
        """As `CompletionModel.forward`; with lagged weights without gradient and dropout."""
        if weights == "trained":
            return super().forward(batch, length_normalized=length_normalized)
        with torch.no_grad(), _evaluating(self):
            if self.lagged is not None:
                found: torch.Tensor = self.lagged(batch, length_normalized=length_normalized)
                return found
            with _active(self.causal_lm, LAGGED):
                return super().forward(batch, length_normalized=length_normalized)

    def lagged_pairs(self) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
        """(name, trained parameter, the lagged one that follows it), in the same order on every worker."""
        if self.lagged is not None:
            followers = dict(self.lagged.causal_lm.named_parameters())
            return [(name, parameter, followers[name]) for name, parameter in self.causal_lm.named_parameters()]
        trained, lagged = (_adapter(self.causal_lm, name) for name in (TRAINED, LAGGED))
        return [(name, ours, theirs) for (name, ours), (_, theirs) in zip(trained, lagged, strict=True)]


def _adapter(causal_lm: Any, adapter: str) -> list[tuple[str, nn.Parameter]]:
    """The adapter's parameters by name."""
    return [(name, p) for name, p in causal_lm.named_parameters() if adapter in name.split(".") and "lora_" in name]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _active(causal_lm: nn.Module, adapter: str) -> Iterator[None]:
    """Have this adapter take part in the forward pass.

    PEFT's own `set_adapter` also says which parameters want gradients, and an optimiser that shards them has already
    looked: so only the name is changed.
    """
    layers = [module for module in causal_lm.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [adapter]
    try:
        yield
    finally:
        for layer, name in zip(layers, before, strict=True):
            layer._active_adapter = name
