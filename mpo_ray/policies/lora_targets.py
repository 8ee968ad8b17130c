"""Which layers a run's own LoRA adapts: from `lora.target_modules` and a model to names that PEFT is given.

Only layers are named that a mixture can stack later. A model on the meta device is enough.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba, check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers.pytorch_utils import Conv1D

from mpo_ray.policies.linear_layers import linear_layers
from mpo_ray.policies.loading import ModelError

ALL_LINEAR = "all-linear"
#: Names that a message lists.
NUM_NAMED = 8


def lora_config(
    model: Any, *, rank: int, alpha: float, dropout: float, target_modules: str | Sequence[str]
) -> LoraConfig:
    """The LoRA that a run puts on a causal language model. Raises ModelError as `lora_targets`."""
    targets = lora_targets(model, target_modules)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in linear_layers(model).values()),
        task_type="CAUSAL_LM",
    )


def lora_targets(model: Any, wanted: str | Sequence[str]) -> str | list[str]:
    """What PEFT is given as `target_modules` for a causal language model.

    `all-linear` becomes the names of all linear layers that can be adapted: not the output head, and not the experts
    of a mixture of experts, whose weights are one tensor. Anything else is checked and given back.
    Raises ModelError for a name that no layer has, for what is no regular expression, and for layers that an adapter
    cannot be added to.
    """
    linear = linear_layers(model)
    refused = {leaf: why for leaf in _leaves(linear) if (why := _refusal(model, leaf)) is not None}
    if wanted == ALL_LINEAR:
        usable = [name for name in linear if _leaf(name) not in refused]
        if not usable:
            raise ModelError(
                f"lora.target_modules: a {type(model).__name__} has no linear layer that an adapter can be added to. "
                "Set lora: null, which trains all weights."
            )
        others = [name for name, _ in model.named_modules() if name not in usable]
        return sorted(_short_names(usable, others))
    if not wanted:
        raise ModelError(f"lora.target_modules: names no layer. {_offer(linear, refused)}")
    if isinstance(wanted, str):
        try:
            re.compile(wanted)
        except re.error as error:
            raise ModelError(
                f"lora.target_modules: {wanted!r} is no regular expression ({error}). Correct it, or list names."
            ) from error
    entries = [wanted] if isinstance(wanted, str) else list(wanted)
    names = [name for name, _ in model.named_modules() if name]
    for entry in entries:
        own = wanted if isinstance(wanted, str) else [entry]
        found = [name for name in names if check_target_module_exists(LoraConfig(target_modules=own), name)]
        why = None if isinstance(wanted, str) else _refusal(model, _leaf(entry))
        if why is None and not found:
            near = difflib.get_close_matches(_leaf(entry), _leaves(linear), n=3, cutoff=0.4)
            hint = f"Did you mean {' or '.join(near)}?" if near else _offer(linear, refused)
            raise ModelError(
                f"lora.target_modules: {entry!r} is the name of no layer of this {type(model).__name__}. {hint}"
            )
        for name in found:
            if why is not None:
                break
            if name not in linear:
                why = f"it is a {type(model.get_submodule(name)).__name__}" + _which_end(model, name)
            else:
                why = refused.get(_leaf(name))
        if why is not None:
            raise ModelError(
                f"lora.target_modules: {entry!r} of this {type(model).__name__} cannot be adapted here: {why}. "
                f"{_offer(linear, refused)}"
            )
    return wanted if isinstance(wanted, str) else list(wanted)


def _refusal(model: Any, leaf: str) -> str | None:
    """Why PEFT would not put a plain adapter on the layers of this name; None if it would."""
    config = LoraConfig(target_modules=[leaf])
    try:
        _check_lora_target_modules_mamba(config, model, leaf)
    except ValueError:
        return "the model reads its weight without calling the layer, so that an adapter would change nothing"
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        return _EXPERTS
    return _EXPERTS if getattr(config, "target_parameters", None) else None


_EXPERTS = (
    "in this family PEFT takes the name for the weights of the experts, which are one tensor, and adapters of such "
    "tensors cannot be stacked"
)


def _which_end(model: Any, name: str) -> str:
    layer = model.get_submodule(name)
    if layer is model.get_output_embeddings():
        return ", the output head, which the policies of a mixture share"
    if layer is model.get_input_embeddings():
        return ", the embeddings, which the policies of a mixture share"
    return ", and adapters are added to linear layers"


def _offer(linear: Iterable[str], refused: Iterable[str]) -> str:
    usable = [leaf for leaf in _leaves(linear) if leaf not in refused]
    more = ", …" if len(usable) > NUM_NAMED else ""
    return f"Layers that can be: {', '.join(usable[:NUM_NAMED])}{more}; or all-linear, which takes all of them."


def _short_names(names: Sequence[str], others: Iterable[str]) -> set[str]:
    """The last parts of the names, or whole names where a module that is not meant ends in the same part."""
    taken = {_leaf(name) for name in others}
    return {name if _leaf(name) in taken or _leaf(name).isdecimal() else _leaf(name) for name in names}


def _leaves(names: Iterable[str]) -> list[str]:
    return sorted({_leaf(name) for name in names})


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
