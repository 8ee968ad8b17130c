"""Vocabularies: what must agree before the probabilities of several policies are multiplied.

Compares tokenizers that are open. Where a tokenizer comes from is another module's business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from mpo_ray.policies.loading import ModelError


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of tokens with their ids, special tokens and merges: names a tokenizer, whatever token pads.

    The padding token is left out of the special tokens: it is never predicted, and loading may have set it.
    """
    content = [sorted(tokenizer.get_vocab().items()), sorted(_special_ids(tokenizer).items()), _merges(tokenizer)]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def check_same_vocabulary(tokenizers: Mapping[str, PreTrainedTokenizerBase], *, num_ids: int | None = None) -> None:
    """Refuse tokenizers, given by objective, that do not have one vocabulary. Raises ModelError.

    num_ids: rows of the output layers. A model cannot draw a larger id, so that larger ids are not compared.
    """
    (first, expected), *others = tokenizers.items()
    for name, tokenizer in others:
        found = difference(expected, tokenizer, num_ids=num_ids)
        if found is not None:
            raise ModelError(
                f"Policies {first!r} and {name!r} have different vocabularies: {found}. A log-linear mixture "
                "multiplies probabilities token by token, so all policies need one vocabulary. Train them from the "
                "same base model, or leave one of them out."
            )


def difference(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase, *, num_ids: int | None = None) -> str | None:
    """The first difference between two vocabularies, in words, or None.

    Compared are the tokens by id below `num_ids`, the start and the end token, and the merge rules. The padding token
    of one tokenizer may have an id that the other does not use, or pads with as well: no model learns to draw it.
    """
    tokens_a, tokens_b = ({index: token for token, index in t.get_vocab().items()} for t in (a, b))
    for index in sorted(tokens_a.keys() | tokens_b.keys()):
        one, other = tokens_a.get(index), tokens_b.get(index)
        only_pads = one in (None, a.pad_token) and other in (None, b.pad_token)
        if one != other and not only_pads and (num_ids is None or index < num_ids):
            return f"{len(tokens_a)} and {len(tokens_b)} tokens; first difference at id {index} ({one!r} and {other!r})"
    special_a, special_b = _special_ids(a), _special_ids(b)
    for key in ("bos_token", "eos_token"):
        if special_a.get(key) != special_b.get(key):
            return (
                f"{len(tokens_a)} and {len(tokens_b)} tokens; {key} is {_named(a, key)} and {_named(b, key)}. If both "
                f"models were trained with the same {key}, set it in the tokenizer_config.json of both"
            )
    if _merges(a) != _merges(b):
        return f"{len(tokens_a)} and {len(tokens_b)} tokens; their merge rules differ"
    return None


def _named(tokenizer: PreTrainedTokenizerBase, key: str) -> str:
    token = getattr(tokenizer, key)
    return "unset" if token is None else f"{token!r} (id {tokenizer.convert_tokens_to_ids(token)})"


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    named = {key: token for key, token in tokenizer.special_tokens_map.items() if key != "pad_token"}
    ids: dict[str, Any] = {
        key: tokenizer.convert_tokens_to_ids([str(t) for t in (token if isinstance(token, list) else [token])])
        for key, token in named.items()
    }
    return ids


def _merges(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())["model"].get("merges")
