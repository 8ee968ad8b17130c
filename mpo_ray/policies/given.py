"""Policies as their owners keep them, and the two forms in which a mixture holds them.

A policy is given as a directory or a hub id: a model, or an adapter of the reference with or without a tokenizer. A
mixture holds a LoRA adapter that can be stacked as it is, every other policy as a model with full weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedTokenizerBase

from mpo_ray.policies.adapters import AdapterStack
from mpo_ray.policies.loading import (
    ADAPTER_CONFIG,
    HUB_ID,
    ModelError,
    check_adapter,
    check_loads,
    check_model_files,
    empty_model,
    is_adapter,
    load_tokenizer,
)
from mpo_ray.policies.lora_file import MADE_AGAIN, check_known
from mpo_ray.policies.merging import check_fit, load_merged_adapter
from mpo_ray.policies.precision import PRECISIONS
from mpo_ray.policies.vocabulary import check_same_vocabulary, difference
from mpo_ray.policies.weight_files import check_weight_files, weight_files

#: What says something of a policy in the files at the top of its directory; checkpoints and pickles are left behind.
KEPT = {".json", ".safetensors", ".jinja", ".model", ".txt"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
#: Told to whoever asked for the mixture.
Tell = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class GivenPolicy:
    """A policy whose files were looked at: they are there, whole and finite.

    path: its directory; has_to_merge: whether it is an adapter that fits the reference and cannot be stacked on it
    vocab_size: rows of its output layer
    """

    path: Path
    tokenizer: PreTrainedTokenizerBase | None
    has_to_merge: bool
    vocab_size: int


def find_policy(given: str | Path) -> Path:
    """The directory on this machine of a policy that is given by a directory or a hub id. Raises ModelError.

    An adapter may lie in a directory inside, as PEFT saves one that has a name: in `default`, or in the only one.
    """
    path = Path(given)
    if not path.is_dir():
        if path.exists() or not HUB_ID.fullmatch(str(given)):
            found = "is a file" if path.exists() else "no such policy directory"
            raise ModelError(f"{given}: {found}; give the directory of a policy, or a hub id (owner/name).")
        path = _from_hub(str(given))
    if (path / ADAPTER_CONFIG).is_file() or (path / "config.json").is_file():
        return path
    inside = sorted(config.parent.name for config in path.glob(f"*/{ADAPTER_CONFIG}"))
    if "default" in inside or len(inside) == 1:
        return path / ("default" if "default" in inside else inside[0])
    if inside:
        raise ModelError(
            f"{given}: holds {len(inside)} adapters: {', '.join(inside)}. Name one of them: {path / inside[0]}"
        )
    if not any(path.glob("*.safetensors")):
        found = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
        raise ModelError(f"{given}: a policy is safetensors, adapter or full weights; found {found}. Convert it first.")
    raise ModelError(
        f"{given}: has weights, but neither {ADAPTER_CONFIG}, as an adapter has, nor config.json, as a model has. Copy "
        "it whole."
    )


def look_at(given: str | Path, reference: str) -> GivenPolicy:
    """Look at a policy's files, without opening a model. Raises ModelError for what does not fit the reference."""
    path = find_policy(given)
    tokenizer = load_tokenizer(str(path)) if _has_tokenizer(path) else None
    if not is_adapter(path):
        check_model_files(str(path))
        weight_files(path)
        check_loads(path)
        check_weight_files(path)
        return GivenPolicy(path, tokenizer, has_to_merge=False, vocab_size=_vocab_size(path))
    check_adapter(path)
    check_known(path)
    check_weight_files(path)
    try:
        AdapterStack(empty_model(reference), {"policy": path})
    except ModelError:
        return GivenPolicy(path, tokenizer, has_to_merge=True, vocab_size=check_fit(empty_model(reference), path))
    return GivenPolicy(path, tokenizer, has_to_merge=False, vocab_size=_vocab_size(reference))


def keep(policy: GivenPolicy, name: str, reference: str, into: Path, *, precision: str, tell: Tell) -> Path:
    """The directory that a mixture can hold: the policy's own, or `into` with full weights where it has to be merged.

    Raises ModelError where it cannot be merged.
    """
    if is_adapter(policy.path):
        trained = json.loads((policy.path / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if trained and _base_name(trained) != _base_name(reference):
            tell(
                f"caution: policy {name!r} says that it was trained from {trained}, and the reference is {reference}. "
                "If these are two models, the adapter is wrong on this one, though it fits."
            )
    if not policy.has_to_merge:
        return policy.path
    merged = load_merged_adapter(policy.path, reference).to(PRECISIONS[precision])
    merged.save_pretrained(into)
    if policy.tokenizer is not None:
        policy.tokenizer.save_pretrained(into)
    size = sum(file.stat().st_size for file in into.glob("*.safetensors")) / 2**20
    tell(
        f"policy {name!r}, {reason(policy.path)}, is merged into the reference and kept with full weights: {size:.4g} "
        "MiB of memory, and a pass of its own for each token. A plain LoRA adapter would share the reference's."
    )
    return into


def reason(path: Path) -> str:
    """In words, what an adapter is that cannot be stacked."""
    config = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    start = str(config.get("init_lora_weights"))
    kinds = {
        "a DoRA adapter": config.get("use_dora"),
        f"an adapter with whole layers (modules_to_save: {config.get('modules_to_save')})": config.get(
            "modules_to_save"
        ),
        "an adapter with rows of single tokens (trainable_token_indices)": config.get("trainable_token_indices"),
        "an adapter with biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
        f"an adapter that changes the reference's weights first ({start})": start in MADE_AGAIN,
    }
    return next((words for words, is_one in kinds.items() if is_one), "an adapter of other layers than linear ones")


def check_comparable(name: str, given: str, reference: str) -> str | None:
    """Refuse a model that cannot be evaluated beside `reference`, without opening it. Raises ModelError.

    KL to the reference is a sum over tokens, so both need one vocabulary and output layers of one size. Returns a
    caution where their chat templates differ, else None.
    """
    place = f"evaluation.models.{name}"
    policy = look_at(given, reference)
    size, wanted = policy.vocab_size, _vocab_size(reference)
    if size != wanted:
        raise ModelError(
            f"{place}: the output layers of {given} and of the reference {reference} have {size} and {wanted} entries; "
            "give a model that was trained from the same base model, or remove it."
        )
    if policy.tokenizer is None:
        return None
    ours = load_tokenizer(reference)
    found = difference(policy.tokenizer, ours, num_ids=wanted)
    if found is not None:
        raise ModelError(
            f"{place}: {given} and the reference {reference} have different vocabularies: {found}. KL to the reference "
            "compares probabilities token by token; give a model that was trained from the same base model, or remove "
            "it."
        )
    theirs, own = _rendered(policy.tokenizer), _rendered(ours)
    if None in (theirs, own) or theirs == own:
        return None
    return (
        f"caution: {place} has another chat template than the reference ({theirs!r}, not {own!r}); it is given the "
        "reference's prompts."
    )


def check_together(
    policies: Mapping[str, GivenPolicy], reference: PreTrainedTokenizerBase, tell: Tell
) -> PreTrainedTokenizerBase:
    """Refuse policies that do not have one vocabulary; return the tokenizer that serves them all. Raises ModelError.

    Policies are compared with each other; the reference's tokenizer is that of those that have none.
    """
    sizes = {name: policy.vocab_size for name, policy in policies.items()}
    if len({*sizes.values()}) > 1:
        listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ModelError(
            f"The output layers of the policies differ in size ({listed}), and a log-linear mixture multiplies "
            "probabilities token by token. Where the further ids are only padding, bring the policies to one size with "
            "transformers' model.resize_token_embeddings(SIZE) and save them again."
        )
    own = {name: reference if p.tokenizer is None else p.tokenizer for name, p in policies.items()}
    size = min(sizes.values())
    check_same_vocabulary(own, num_ids=size)
    chosen = _with_template(own, tell)
    if chosen.pad_token_id is not None and chosen.pad_token_id >= size:
        chosen.pad_token = chosen.eos_token  # a token without a row in the embeddings cannot be put into a batch
    return chosen


def _with_template(tokenizers: Mapping[str, PreTrainedTokenizerBase], tell: Tell) -> PreTrainedTokenizerBase:
    """The first tokenizer that has a chat template; says where another one renders a conversation otherwise."""
    rendered = {name: _rendered(tokenizer) for name, tokenizer in tokenizers.items()}
    have = {name: text for name, text in rendered.items() if text is not None}
    if not have:
        return next(iter(tokenizers.values()))
    first = next(iter(have))
    others = [name for name, text in have.items() if text != have[first]]
    if others:
        tell(
            f"caution: the chat templates of {first!r} and {', '.join(map(repr, others))} differ: {have[first]!r} and "
            f"{have[others[0]]!r}. The mixture gives all policies the prompts of {first!r}."
        )
    return tokenizers[first]


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A short conversation as the chat template writes it, or None where there is no template."""
    if not tokenizer.chat_template:
        return None
    conversation = [
        {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    except Exception:  # a template may raise anything; then its text is what is compared
        return str(tokenizer.chat_template)


def _base_name(model: str) -> str:
    """The last part of a model's hub id or directory; of a directory in the hub's cache, that of its hub id."""
    cached = [part for part in Path(model).parts if part.startswith("models--")]
    return cached[-1].rpartition("--")[2] if cached else Path(model).name


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in _TOKENIZER_FILES)


def _vocab_size(model: str | Path) -> int:
    return int(AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config().vocab_size)


def _from_hub(name: str) -> Path:
    """The files of a policy on the hub, or of the copy that the cache holds; its adapter may be in `default`."""
    try:
        path = Path(snapshot_download(name, allow_patterns=[f"*{end}" for end in KEPT], ignore_patterns=["*/*"]))
        if not (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
            path = Path(snapshot_download(name, allow_patterns=[f"default/*{end}" for end in KEPT]))
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ModelError(f"{name}: no such directory, and as a hub id it could not be fetched: {text[:300]}") from error
    return path
