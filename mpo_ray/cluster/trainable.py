"""The models that trainings take: all weights of one, or adapters on a base that stays open from one to the next."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model

from mpo_ray.config_training import ConstrainedTraining, Lora, PolicyTraining, Training
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.policies.loading import load_model
from mpo_ray.policies.lora_targets import lora_config
from mpo_ray.training.lagged import LaggedModel, add_lagged_adapter, keeps_lagged


class KeptBase:
    """The base of a worker's trainings. Adapters leave it as it was opened, so the next ones are put on it again.

    Where trainings change its weights, or where ZeRO 3 shards them, each opens its own.
    """

    def __init__(self) -> None:
        self._base: Any = None
        self._opened: tuple[str, str, bool, bool] | None = None

    def completion_model(self, path: str, training: Training, *, seed: int) -> CompletionModel:
        """The model that a run trains, and beside it what it was, where the run compares with that."""
        model = self.trainable(path, training, seed=seed)
        if not keeps_lagged(training):
            return CompletionModel(model)
        if lora_of(training) is None:
            return LaggedModel(model, load_model(path, precision=training.precision))
        add_lagged_adapter(model)
        return LaggedModel(model)

    def trainable(self, path: str, training: Training, *, seed: int) -> Any:
        """As `load_trainable`, on the base that is open, if that is the same and the training leaves it so.

        PEFT has frozen the weights of a base that is open, so a training of all weights cannot take it.
        """
        opened = (path, training.precision, has_dropout(training), training.gradient_checkpointing)
        if self._base is None or self._opened != opened or not keeps_base(training):
            self._base = None  # two at a time would need twice the memory
            self._base, self._opened = open_base(path, training), opened
        base = self._base
        if not keeps_base(training):
            self._base = None
        return with_adapters(base, training, seed=seed)

    def take_back(self, model: CompletionModel, training: Training) -> None:
        """Take the adapters from the base, of a training that is over."""
        if keeps_base(training):
            self._base = model.causal_lm.unload().to("cpu").eval()
            self._base.zero_grad(set_to_none=True)


def keeps_base(training: Training) -> bool:
    """Whether a training leaves the base as it was opened."""
    return lora_of(training) is not None and training.zero_stage < 3


def load_trainable(path: str, training: Training, *, seed: int) -> Any:
    """Open the model that a run trains: all its weights, or LoRA adapters whose start the seed alone decides.

    The model's own dropout is off where a policy is compared with a reference, unless that is asked for; LoRA's stays.
    """
    return with_adapters(open_base(path, training), training, seed=seed)


def open_base(path: str, training: Training) -> Any:
    """Open a model for a training, without adapters."""
    model: Any = load_model(path, precision=training.precision, without_dropout=not has_dropout(training))
    if training.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model


def with_adapters(model: Any, training: Training, *, seed: int) -> Any:
    """Put a training's LoRA adapters on a model, if it has any; the seed alone decides how they start."""
    lora = lora_of(training)
    if lora is None:
        return model
    torch.manual_seed(seed)
    how: dict[str, Any] = {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "dropout": lora.dropout,
        "target_modules": lora.target_modules,
    }
    return get_peft_model(model, lora_config(model, **how))


def has_dropout(training: Training) -> bool:
    """Whether the model's own dropout is on in a training."""
    return not isinstance(training, PolicyTraining | ConstrainedTraining) or training.model_dropout


def lora_of(training: Training) -> Lora | None:
    """The adapters of a training, None where it trains all weights."""
    return training.lora if isinstance(training, PolicyTraining | ConstrainedTraining) else None
