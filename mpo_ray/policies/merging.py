"""An adapter of any kind that PEFT can merge, made part of the weights of the model that it adapts.

The merged model computes what the adapter computes beside its model; whatever PEFT's merge changes is refused.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from mpo_ray.policies.loading import ADAPTER_WEIGHTS, ModelError, add_adapter, load_model

#: How far the merged model's logits may be from the adapter's, relative to the largest: float32 rounds a product's sum.
TOLERANCE = 1e-3
#: Tokens of the sequence on which both are compared.
PROBE = 16


def load_merged_adapter(path: str | Path, reference: str) -> PreTrainedModel:
    """Open the model `reference` with the adapter merged into its weights, in float32, on the CPU.

    Where the adapter's file holds embeddings of more rows than the model has, these are added first. Raises ModelError
    where the adapter does not fit or cannot be merged.
    """
    model = load_model(reference)
    _resize(model, Path(path))
    return merge(add_adapter(model, path, name="default").eval(), path)


def check_fit(model: PreTrainedModel, path: str | Path) -> int:
    """Refuse an adapter that has too few or too many tensors for a model, or some of another shape. Raises ModelError.

    model: without weights (device "meta"); it is changed. Returns the rows of the output layer with the adapter.
    """
    rows = _resize(model, Path(path))
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="for .*: copying from a non-meta parameter"
        )  # there is nothing to copy
        add_adapter(model, path, name="default")
    return rows


@torch.no_grad()
def merge(adapted: PeftModel, path: str | Path) -> PreTrainedModel:
    """The adapted model without its adapter, whose updates are added to the weights. Raises ModelError."""
    base = adapted.get_base_model()
    probe = _probe(base, adapted.peft_config["default"])
    expected = adapted(input_ids=probe).logits
    _untie_adapted(base)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")  # untied above
            warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
            merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, AttributeError) as error:
        raise ModelError(f"{path}: PEFT cannot merge this adapter into its model: {error}") from error
    difference = float((merged(input_ids=probe).logits - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ModelError(
            f"{path}: merged into its model, this adapter computes something else than beside it (the logits differ by "
            f"{difference:.2g}), so a mixture cannot hold it. Train a plain LoRA."
        )
    return merged.eval()


def untie(model: PreTrainedModel) -> None:
    """Give the output layer weights of its own, equal to those that it shares with the input embeddings."""
    outputs: Any = _plain(model.get_output_embeddings())
    outputs.weight = nn.Parameter(outputs.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output layer's weights are the input embeddings' own."""
    inputs, outputs = _plain(model.get_input_embeddings()), _plain(model.get_output_embeddings())
    return outputs is not None and inputs.weight is outputs.weight


def _untie_adapted(base: PreTrainedModel) -> None:
    """An update of one of the tied layers must not change the other one, as it does not beside the model."""
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    if is_tied(base) and any(isinstance(layer, BaseTunerLayer) for layer in layers):
        untie(base)


def _plain(layer: Any) -> Any:
    """The model's own layer under PEFT's wrappers."""
    while (inner := getattr(layer, "base_layer", None) or getattr(layer, "original_module", None)) is not None:
        layer = inner
    return layer


def _probe(base: PreTrainedModel, config: Any) -> Tensor:
    """Token ids from all over the vocabulary, and those that the adapter trained by themselves, (1, T)."""
    rows = _plain(base.get_input_embeddings()).weight.shape[0]
    trained = getattr(config, "trainable_token_indices", None) or []
    chosen = [*trained] if not isinstance(trained, dict) else [i for indices in trained.values() for i in indices]
    spread = [i * rows // PROBE for i in range(PROBE)]
    return torch.tensor([[*spread, *chosen[:PROBE]]])


def _resize(model: PreTrainedModel, path: Path) -> int:
    """Give the model as many embeddings as the adapter was saved with, where its file says so; returns how many."""
    embeddings = model.get_input_embeddings()
    rows = int(embeddings.weight.shape[0])
    name = next(name for name, module in model.named_modules() if module is embeddings)
    with safe_open(path / ADAPTER_WEIGHTS, framework="pt") as file:
        for key in {*file.keys()} & {f"base_model.model.{name}{inner}.weight" for inner in ("", ".base_layer")}:
            saved = int(file.get_slice(key).get_shape()[0])
            if saved != rows:
                model.resize_token_embeddings(saved, mean_resizing=False)
            return saved
    return rows
