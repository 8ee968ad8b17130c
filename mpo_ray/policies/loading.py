"""Opening models and tokenizers: safetensors only, no code from a model's directory, nothing initialised silently.

Whatever cannot be opened is a ModelError that says what was found there and what to do.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mpo_ray.data.end_tokens import model_ends
from mpo_ray.data.rendering import Rendering
from mpo_ray.policies.dropout import config_without_dropout
from mpo_ray.policies.precision import PRECISIONS

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
#: What a hub id looks like: `name` or `owner/name`.
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")


class ModelError(ValueError):
    """A model, adapter or tokenizer cannot be used as asked. The message says what was found and what to do."""


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a model directory or hub id.

    Its end token pads where it names no padding token, or one that the model has no row for.
    """
    _check_place(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{path}: no tokenizer could be opened there: {_short(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{path}: the tokenizer has no end token (eos_token); responses could never end. Set one.")
    pad_within(tokenizer, num_token_ids(path))
    return tokenizer


def pad_within(tokenizer: PreTrainedTokenizerBase, num_ids: int | None) -> None:
    """Let the end token pad where the padding token is none of a model's `num_ids`: padding needs no row of its own."""
    if tokenizer.pad_token_id is None or (num_ids is not None and tokenizer.pad_token_id >= num_ids):
        tokenizer.pad_token = tokenizer.eos_token


def num_token_ids(path: str) -> int | None:
    """How many token ids the model of a directory or hub id has rows for, by its configuration; None where it has none.

    A directory with an adapter or a tokenizer alone has no configuration.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(path)
    except OSError:
        return None
    size = {**config, **(config.get("text_config") or {})}.get("vocab_size")
    return None if size is None else int(size)


def load_rendering(path: str, **settings: Any) -> Rendering:
    """How prompts and replies of the model at a directory or hub id become token ids. settings: see `Rendering`

    Raises ModelError, and ValueError for chat_template_kwargs that its template does not read.
    """
    return Rendering(load_tokenizer(path), model_ends=model_ends(path), num_ids=num_token_ids(path), **settings)


def empty_model(path: str) -> PreTrainedModel:
    """A causal language model on the meta device: its layers with their names and sizes, without weights.

    Raises ModelError for a directory or hub id that `load_model` could not open.
    """
    check_model_files(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{path}: no causal language model could be made of it: {_short(error)}") from error
    return model.eval()


def load_model(path: str, *, precision: str = "fp32", without_dropout: bool = False) -> PreTrainedModel:
    """Open a causal language model with its full weights, in evaluation mode, on the CPU.

    without_dropout: whatever its configuration asks for while it is trained
    """
    return _load(AutoModelForCausalLM, path, precision, without_dropout=without_dropout)


def load_policy(path: str, reference: str, *, precision: str = "fp32") -> PreTrainedModel:
    """Open a policy: a LoRA adapter on a fresh copy of `reference` where `path` holds one, else full weights."""
    if not is_adapter(path):
        return load_model(path, precision=precision)
    check_adapter(path)
    model = load_model(reference, precision=precision)
    return add_adapter(model, path, name="default").eval()


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds an adapter rather than full weights."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def check_adapter(path: str | Path) -> None:
    """Refuse an adapter without safetensors, or of a kind other than LoRA, before any model is loaded."""
    directory = Path(path)
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise ModelError(_no_safetensors(directory, ADAPTER_WEIGHTS))
    try:
        kind = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{directory / ADAPTER_CONFIG}: not a PEFT configuration: {error}") from error
    if kind != "LORA":
        raise ModelError(f"{directory}: the adapter's peft_type is {kind!r}; only LORA adapters are supported.")


def add_adapter(model: PreTrainedModel | PeftModel, path: str | Path, *, name: str) -> PeftModel:
    """Put the LoRA adapter at `path` on `model` under `name`; every tensor of the file is used, none is missing."""
    check_adapter(path)
    config = PeftConfig.from_pretrained(str(path))
    config.inference_mode = True
    if model.device.type == "meta":
        config.init_lora_weights = False  # a start that is made from the base's weights has none here
    how: dict[str, Any] = {"is_trainable": False, "torch_device": "cpu"}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # compared by name below
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # PEFT sets it right
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # untied before a merge
            warnings.filterwarnings(
                "ignore", message="The following .*_pattern keys did not match"
            )  # of experts' layers
            if isinstance(model, PeftModel):
                adapted = model
            else:
                adapted = PeftModel.from_pretrained(model, str(path), name, config=config, torch_device="cpu")
            found = adapted.load_adapter(str(path), name, **how)  # the second time for what it says
    except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"{path}: the adapter does not fit the reference model: {_short(error)} Was it trained on another one?"
        ) from error
    with safe_open(Path(path) / ADAPTER_WEIGHTS, framework="pt") as file:
        stored = {*file.keys()}
    missing = sorted(found.missing_keys)
    if config.bias != "none":  # PEFT looks at factors alone
        missing += sorted({*get_peft_model_state_dict(adapted, adapter_name=name)} - stored)
    # of a whole layer of a resized model, PEFT writes a second copy, which it does not read
    copies = {key for key in found.unexpected_keys if key.replace(".modules_to_save.", ".", 1) in stored - {key}}
    unused = sorted({*found.unexpected_keys} - copies)
    if missing or unused:
        raise ModelError(
            f"{path}: the adapter does not fit the reference model: {len(missing)} tensors are missing from it and "
            f"{len(unused)} find no place, first {[*missing, *unused][0]!r}. Was it trained on another one?"
        )
    return adapted


def load_reward_model(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a sequence classifier with one logit, the reward of a text, with its tokenizer."""
    model = _load(AutoModelForSequenceClassification, path, "fp32")
    if model.config.num_labels != 1:
        raise ModelError(
            f"{path}: the classifier has {model.config.num_labels} logits; a reward model has one. Use a model trained "
            "with num_labels=1, or a Python callable that turns its logits into one number."
        )
    tokenizer = load_tokenizer(path)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def check_model_files(path: str) -> None:
    """Refuse a model directory that `load_model` could not open, without opening it; a hub id must look like one."""
    _check_place(path)
    directory = Path(path)
    if directory.is_dir():
        if is_adapter(path):
            raise ModelError(f"{path}: holds a LoRA adapter, not a model; name its reference model here.")
        if not (directory / "config.json").is_file():
            raise ModelError(f"{path}: is not a model directory; it has no config.json but {_listing(directory)}.")
        if not any(directory.glob("*.safetensors")):
            raise ModelError(_no_safetensors(directory, "model.safetensors"))


def check_loads(path: str | Path) -> None:
    """Refuse a model some of whose weights are missing or have another shape, by its files' headers alone.

    Raises ModelError as `load_model` does. Takes no memory for weights.
    """
    _load(AutoModelForCausalLM, str(path), "fp32", device_map="meta")


def _load(auto: Any, path: str, precision: str, *, without_dropout: bool = False, **how: Any) -> PreTrainedModel:
    if precision not in PRECISIONS:
        raise ModelError(f"precision {precision!r} is unknown; known are {', '.join(PRECISIONS)}.")
    check_model_files(path)
    try:
        if without_dropout:
            how["config"] = config_without_dropout(path)
        model, loading = auto.from_pretrained(
            path,
            dtype=PRECISIONS[precision],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **how,
        )
    except Exception as error:
        raise ModelError(f"{path}: the model could not be opened: {_short(error)}") from error
    lacking = [repr(name) for name in sorted(loading["missing_keys"])]
    lacking += [
        f"{name!r} ({tuple(saved)} in its files, {tuple(wanted)} by its config.json)"
        for name, saved, wanted in sorted(loading["mismatched_keys"])
    ]
    if lacking:
        raise ModelError(
            f"{path}: {len(lacking)} weights of a {type(model).__name__} are not in its files or have another shape, "
            f"first {lacking[0]}; they would be random. Is it a model of this kind, saved whole?"
        )
    return model.eval()


def _check_place(path: str) -> None:
    """A path that is no directory must at least look like a hub id."""
    if not Path(path).is_dir() and (Path(path).exists() or not HUB_ID.fullmatch(path)):
        found = "is a file" if Path(path).exists() else "no such directory"
        raise ModelError(f"{path}: {found}; give a model's directory or a hub id (owner/name).")


def _no_safetensors(directory: Path, expected: str) -> str:
    others = sorted(file.name for pattern in OTHER_WEIGHTS for file in directory.glob(pattern))
    if not others:
        return f"{directory}: has no {expected} but {_listing(directory)}; save the model whole and try again."
    return (
        f"{directory}: has no {expected} but {', '.join(others)}. Such files can run code when they are opened, so "
        "only safetensors are read: convert it, by opening it once in a program where you trust it and saving it with "
        "`model.save_pretrained(DIRECTORY)`."
    )


def _listing(directory: Path) -> str:
    names = sorted(file.name for file in directory.iterdir())
    return "nothing at all" if not names else ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " …"
