"""A model as a CPU decodes it fastest. Whoever opens a model to draw from it applies this; a decoder takes any model.

A step of decoding computes few rows, so that its time goes into calls and into reading weights: weights are packed,
those of layers that are given one input as one (`packed_linear`), and RMS norms take fewer calls (`short_norm`). So in
float32; in bfloat16 weights alone are packed, where oneDNN can (AMX, AVX-512) and a timed product takes less time.
There norms stay as they are: with another rounding, scores of a changed model would not be those of the same model
unchanged. Long batches gain nothing: a model that only scores or learns stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpo_ray.policies.adapters import AdapterStack
from mpo_ray.policies.loading import ModelError
from mpo_ray.policies.packed_linear import can_pack, only_called, pack_linears
from mpo_ray.policies.probe import MOST_DIFFERENCE, difference, probe_ids
from mpo_ray.policies.ragged_attention import carries_states
from mpo_ray.policies.short_norm import shorten_norms
from mpo_ray.records import REFERENCE

#: Precisions whose models are changed.
DTYPES = (torch.float32, torch.bfloat16)


@torch.no_grad()
def optimize_for_cpu(model: nn.Module) -> bool:
    """Change the layers of a model for decoding on a CPU, where it is on one; says whether it did.

    model: a causal LM or a stack of adapters. Its logits stay the same, and are compared. Afterwards it cannot be
    trained, saved or moved; it can be given here again.
    A model stays as it is in another precision, where layers carry states from token to token, and where it reads the
    weights of linear layers instead of calling them.
    Raises ModelError for logits that are not the same.
    """
    causal_lm: Any = model.base if isinstance(model, AdapterStack) else model
    if causal_lm.device.type != "cpu" or causal_lm.dtype not in DTYPES or carries_states(causal_lm.config) is not None:
        return False
    packs, shortens = can_pack(causal_lm), causal_lm.dtype == torch.float32
    if not packs and not shortens:
        return False
    expected, most = _logits(model), MOST_DIFFERENCE[causal_lm.dtype]
    if not _calls_its_layers(model, expected, most):
        return False
    if packs:
        pack_linears(causal_lm)
    if shortens:
        shorten_norms(causal_lm)
    if not (found := difference(_logits(model), expected)) <= most:
        raise ModelError(
            f"{type(causal_lm).__name__}: its logits differ by {found:.2g} of their size once its layers are changed "
            "for the CPU, which must not be. Please report the model, and use a GPU meanwhile."
        )
    return True


def _calls_its_layers(model: nn.Module, expected: Tensor, most: float) -> bool:
    """Whether the model gives its logits while no linear layer has a weight that could be read."""
    try:
        with only_called(model):
            return difference(_logits(model), expected) <= most
    except Exception:  # an architecture of which nothing is known can fail in any way without them
        return False


def _logits(model: Any) -> Tensor:
    """Of a short text, (1, T, V); of a stack of adapters without any and with its last one, (2, T, V)."""
    if isinstance(model, AdapterStack):
        names = [REFERENCE, *model.names[-1:]]
        logits: Tensor = model(names, input_ids=torch.tensor([probe_ids(model.base)] * len(names))).logits
    else:
        logits = model(input_ids=torch.tensor([probe_ids(model)])).logits
    return logits.float()
