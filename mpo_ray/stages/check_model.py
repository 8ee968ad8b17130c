"""What `mpo-ray check` asks of the reference: files, token ids, the layers of the run's LoRA, how it is decoded.

The model is opened on the meta device, without weights, whatever its size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from mpo_ray.config import RunConfig
from mpo_ray.config_training import Lora
from mpo_ray.data.rendering import Rendering
from mpo_ray.data.text_tokens import RenderingError, UnknownIdError
from mpo_ray.policies.loading import ModelError, check_loads, check_model_files, empty_model, load_rendering
from mpo_ray.policies.lora_targets import lora_targets
from mpo_ray.policies.ragged_attention import blocks_refusal

#: A conversation that shows what the chat template writes around its messages.
_PROMPT, _REPLY = ({"role": "user", "content": "a"},), "b"


def check_reference(path: str, config: RunConfig) -> str:
    """Compare a model with its tokenizer and with what the run trains; returns how it will be decoded, in words.

    Raises ModelError, ValueError: whatever would stop the run after something was paid for.
    """
    check_model_files(path)
    rendering = load_rendering(path, **config.data.rendering)
    model = empty_model(path)
    if Path(path).is_dir():
        check_loads(path)
    check_ids(path, model, rendering)
    for place, lora in lora_of(config).items():
        try:
            lora_targets(model, lora.target_modules)
        except ModelError as error:
            raise ModelError(f"{place}.{error}") from error
    refusal = blocks_refusal(model.config)
    if refusal is None:
        return "decoded by the engine, if a trial at opening agrees, else in transformers' own cache"
    return f"decoded in transformers' own cache, which is slower: {refusal}"


def lora_of(config: RunConfig) -> dict[str, Lora]:
    """Every LoRA that the run trains, by the key of the run file that holds its `lora`."""
    trainings: dict[str, Any] = {"policies": config.policies}
    if config.mopo is not None:
        trainings["mopo.training"] = config.mopo.training
        own = {f"mopo.problems.{name}.training": problem.training for name, problem in config.mopo.problems.items()}
        trainings |= {place: training for place, training in own.items() if training is not None}
    return {place: training.lora for place, training in trainings.items() if training.lora is not None}


def check_ids(path: str, model: Any, rendering: Rendering) -> None:
    """Refuse a tokenizer that writes ids which the model has no row for. The padding token needs none.

    Nor does an end token that only the model names: it is never drawn, and never learned.

    Raises ModelError.
    """
    tokenizer = rendering.tokenizer
    num_rows = min(
        int(layer.weight.shape[0])
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
        if layer is not None
    )
    added = {*tokenizer.added_tokens_decoder}
    ordinary = max((id for id in tokenizer.get_vocab().values() if id not in added), default=0)
    ends = {rendering.end, tokenizer.eos_token_id}
    used = [*(("an end token", id) for id in ends), ("the start token", tokenizer.bos_token_id), ("a token", ordinary)]
    for what, id in used:
        if id is None or id < num_rows:
            continue
        raise ModelError(
            f"{path}: {what} of the tokenizer, {tokenizer.convert_ids_to_tokens(id)!r}, has the id {id}, and the "
            f"model's embedding has {num_rows} rows. {_REMEDY}"
        )
    if not rendering.has_template:
        return
    try:
        rendering.prompt_ids(_PROMPT)
        rendering.ids(_PROMPT, _REPLY)
    except UnknownIdError as error:
        raise ModelError(f"{path}: the chat template does not fit the model: {error}. {_REMEDY}") from error
    except RenderingError as error:
        if isinstance(error.__cause__, TemplateSyntaxError):
            raise ModelError(f"{path}: {error}. Correct the tokenizer's chat_template.") from error
        # it may refuse this conversation, and take the data's


_REMEDY = (
    "Use the tokenizer that was saved with the model, or give the model rows for all tokens (resize_token_embeddings) "
    "and train them first."
)
