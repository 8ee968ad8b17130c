"""The dropout that a model's configuration asks for: switched off for training that compares with a fixed reference.

A policy under dropout is not the policy that samples and that the reference is compared with: even before the first
step its log-ratios would be far from 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from transformers import AutoConfig, PreTrainedConfig

#: Fields of configurations: attention_dropout, resid_pdrop, layerdrop, … Not the noise of routers: Phi-MoE chooses its
#: experts by that number in evaluation as well. `CompletionModel.train` leaves the noise itself out.
_FIELD = re.compile("drop")


def config_without_dropout(path: str) -> PreTrainedConfig:
    """The configuration of the model at `path`, every dropout in it 0, to open the model with."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    for part, field in _fields(config):
        setattr(part, field, type(getattr(part, field))(0))  # some fields take whole numbers only
    return config


def restore_dropout(config: PreTrainedConfig, path: str) -> None:
    """Set them to what they are in the configuration of the model at `path`, from which this one was made."""
    original = AutoConfig.from_pretrained(path, trust_remote_code=False)
    for (part, field), (given, _) in zip(_fields(config), _fields(original), strict=True):
        setattr(part, field, getattr(given, field))


def _fields(config: PreTrainedConfig) -> Iterator[tuple[PreTrainedConfig, str]]:
    for name, value in sorted(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            yield from _fields(value)
        elif _FIELD.search(name) and isinstance(value, int | float) and not isinstance(value, bool):
            yield config, name
