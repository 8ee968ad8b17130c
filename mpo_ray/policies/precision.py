"""The precision of weights, activations and KV cache: one meaning for scoring, sampling, evaluation and serving."""

from __future__ import annotations

import logging
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from mpo_ray.policies.timed import shortest_seconds

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: The files' own precision, unless this machine computes slower in it than in fp32.
AUTO = "auto"
#: Rows and columns of the products that are timed.
ROWS, COLUMNS = 16, 1024

logger = logging.getLogger(__name__)


def own_precision(model: str | Path | Any) -> str:
    """The precision of a model's files, as its configuration says; fp32 if it names none. model: or its path, hub id"""
    config = AutoConfig.from_pretrained(model, trust_remote_code=False) if isinstance(model, str | Path) else model
    wanted = str(config.dtype or config.get_text_config().dtype).removeprefix("torch.")
    return next((name for name, dtype in PRECISIONS.items() if str(dtype).endswith(f".{wanted}")), "fp32")


def resolve(precision: str, model: str | Path | Any, device: str) -> str:
    """`precision` itself, or what `auto` stands for: the model's own where the device is not slower in it than in fp32.

    model: its configuration, path or hub id
    """
    if precision != AUTO:
        return precision
    own = own_precision(model)
    if own == "fp32" or device != "cpu" or not _is_slower(PRECISIONS[own]):
        return own
    logger.info("auto: computing in fp32, in which this processor multiplies faster than in the files' own %s", own)
    return "fp32"


@cache
def _is_slower(dtype: torch.dtype) -> bool:
    """Whether the CPU takes longer for a product in this precision than in float32."""
    seconds = shortest_seconds(
        {one: partial(torch.nn.functional.linear, *example(one)) for one in (torch.float32, dtype)}
    )
    return seconds[dtype] > seconds[torch.float32]


def example(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Few rows and a weight, as in a step of decoding, to time a product with."""
    return torch.ones(ROWS, COLUMNS, dtype=dtype), torch.ones(COLUMNS, COLUMNS, dtype=dtype)
