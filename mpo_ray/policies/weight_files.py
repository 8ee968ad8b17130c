"""Weights on disk: whether the files are all there and whole, and whether every number in them is finite.

Reads safetensors alone, one tensor at a time. Opens no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpo_ray.policies.loading import ADAPTER_WEIGHTS, ModelError, is_adapter

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def check_weight_files(directory: Path) -> None:
    """Refuse an adapter or a model whose files are missing, damaged or not finite. Raises ModelError.

    Every file is read once, at about the speed of the disk.
    """
    check_finite([directory / ADAPTER_WEIGHTS] if is_adapter(directory) else weight_files(directory))


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a model's weights, by its index where it has one. Raises ModelError for a missing one."""
    if (directory / WHOLE).is_file() or not (directory / INDEX).is_file():
        return sorted(directory.glob("*.safetensors"))
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        names = sorted({str(name) for name in index["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{directory / INDEX}: not an index of weights: {error!r}. Copy it again.") from error
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelError(
            f"{directory / missing[0]}: this file of the model is missing ({len(missing)} of {len(names)} that "
            f"{INDEX} lists). Copy the model whole."
        )
    return [directory / name for name in names]


def check_finite(files: Iterable[Path]) -> None:
    """Refuse a file that is damaged, or that has a tensor with NaN or infinity in it. Raises ModelError."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - this is no mapping
                    tensor = tensors.get_tensor(name)
                    if not _is_finite(tensor):
                        bad = int((~torch.isfinite(tensor.float())).sum())
                        raise ModelError(
                            f"{file}: the tensor {name!r} holds {bad} values of {tensor.numel()} that are NaN or "
                            "infinite, so that every probability would be NaN. The training diverged, or the file was "
                            "written in a precision that is too narrow. Take an earlier checkpoint."
                        )
        except SafetensorError as error:
            raise ModelError(f"{file}: the file is damaged: {error}. Copy it again.") from error


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())  # NaN passes through both
    return math.isfinite(low) and math.isfinite(high)
