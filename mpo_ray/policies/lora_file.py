"""A LoRA adapter as PEFT saves it: which ones can be stacked, and their factors.

A setting that changes what the adapter computes and is not known here is refused by its name, never ignored.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mpo_ray.policies.loading import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelError, check_adapter

PREFIX = "base_model.model."
#: Settings of PEFT's LoRA that say how the adapter was made or where it sits, and those that are read here.
_KNOWN = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",  # how the base's layer is stored, which PEFT reads from its class
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
#: Ways to begin that leave the base's weights as they are; the others (PiSSA, OLoRA, LoftQ, CorDA, …) change them.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
#: Those that PEFT makes again from the base's weights when it loads the adapter; of the others, the file holds a part.
MADE_AGAIN = ("pissa", "olora", "mica")
_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class LoraFile:
    """The factors by layer: A (r, in) and B (out, r), with the scaling in B: the layer's weight gains B A."""

    path: Path
    factors: dict[str, tuple[Tensor, Tensor]]
    config: dict[str, Any]

    def targets(self, layer: str) -> bool:
        """Whether the configuration says that this linear layer, which is not the output head, is adapted."""
        wanted = self.config.get("target_modules")
        if wanted is None or wanted == "all-linear":
            return wanted is not None
        names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        return bool(check_target_module_exists(LoraConfig(**{n: self.config.get(n) for n in names}), layer))


def check_known(path: str | Path) -> None:
    """Refuse, by its configuration alone, an adapter that even PEFT would not load as it was trained.

    Raises ModelError: a setting that PEFT does not know, or a start of which the file holds a part only.
    """
    config: dict[str, Any] = json.loads((Path(path) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    for key, value in config.items():
        if key not in fields | {"peft_version"} and value not in (None, False) and value != {} and value != []:
            raise ModelError(
                f"{path}: the adapter sets {key}: {value!r}, which PEFT {peft.__version__} does not know (saved by "
                f"{config.get('peft_version') or 'another version'}). If this setting changes nothing, remove it from "
                f"{ADAPTER_CONFIG}; else merge the adapter into full weights with that version (merge_and_unload)."
            )
    start = config.get("init_lora_weights", True)
    if start not in (*_PLAIN_STARTS, *MADE_AGAIN):
        raise ModelError(
            f"{path}: the adapter began with init_lora_weights: {start!r}, which changed the base's weights in a way "
            "that the file does not hold. Convert it to a plain LoRA, by save_pretrained with "
            "path_initial_model_for_weight_conversion, or merge it into full weights where it was trained."
        )


def check_stackable(path: str | Path) -> dict[str, Any]:
    """Refuse, by its configuration alone, an adapter that cannot be stacked; return the configuration.

    Raises ModelError: DoRA, `modules_to_save`, trained biases and whatever else makes it more than B A.
    """
    check_adapter(path)
    config: dict[str, Any] = json.loads((Path(path) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if config.get("use_dora"):
        raise ModelError(f"{path}: the adapter is DoRA (use_dora), which rescales the base's weights. {_REMEDY}")
    if config.get("modules_to_save"):
        raise ModelError(
            f"{path}: the adapter holds whole copies of {', '.join(config['modules_to_save'])} (modules_to_save); "
            f"policies on one base share these. {_REMEDY}"
        )
    if config.get("bias", "none") != "none":
        raise ModelError(f"{path}: the adapter trained biases (bias: {config['bias']!r}). {_REMEDY}")
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise ModelError(
            f"{path}: the adapter began with init_lora_weights: {config['init_lora_weights']!r}, which changes the "
            f"base's weights too. Convert it to a plain LoRA as PEFT describes. {_REMEDY}"
        )
    defaults = {field.name: _default(field) for field in dataclasses.fields(LoraConfig)}
    for key, value in config.items():
        if key not in _KNOWN and value not in (defaults.get(key), None, False) and value != {} and value != []:
            raise ModelError(
                f"{path}: the adapter sets {key}: {value!r}, which stacked adapters do not know. {_REMEDY}"
            )
    return config


def read_lora(path: str | Path) -> LoraFile:
    """Read an adapter's factors. Raises ModelError where it cannot be stacked or its file holds something else."""
    config = check_stackable(path)
    directory = Path(path)
    try:
        tensors = load_file(directory / ADAPTER_WEIGHTS)
    except SafetensorError as error:
        raise ModelError(f"{directory / ADAPTER_WEIGHTS}: the file is damaged: {error}. Copy it again.") from error
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _FACTOR.fullmatch(key.removeprefix(PREFIX))
        if ".lora_embedding_" in key or ".base_layer." in key:
            raise ModelError(
                f"{directory}: the adapter changes the embeddings or the output head (tensor {key!r}); policies on one "
                f"base share these. {_REMEDY}"
            )
        if found is None or tensor.ndim != 2:
            raise ModelError(f"{directory}: the tensor {key!r} is no factor of a linear layer. {_REMEDY}")
        sides.setdefault(found["layer"], {})[found["side"]] = tensor
    factors = {}
    for layer, pair in sides.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise ModelError(f"{directory}: the factors of {layer!r} are not a pair of one rank. Save it again.")
        scaling = _scaling(config, layer, rank=pair["A"].shape[0])
        factors[layer] = (pair["A"].float(), pair["B"].float() * scaling)
    if not factors:
        raise ModelError(f"{directory}: the adapter has no tensors; save it again.")
    return LoraFile(directory, factors, config)


_REMEDY = "Train a plain LoRA, or write the mixture by `mpo-ray mix`, which merges other adapters into full weights."


def _scaling(config: Mapping[str, Any], layer: str, *, rank: int) -> float:
    """α/r, or α/√r for rank-stabilised LoRA; `alpha_pattern` may give a layer its own α."""
    alpha = float(config.get("lora_alpha", 8))
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = float(own)
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None
