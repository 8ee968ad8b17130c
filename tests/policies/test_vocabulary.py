"""Which vocabularies may be multiplied, and what is said of those that may not."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mpo_ray.policies.loading import ModelError, load_tokenizer
from mpo_ray.policies.vocabulary import check_same_vocabulary, vocabulary_digest
from tests.tiny import tiny_tokenizer


def bpe(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    tokens = {token: index for index, token in enumerate(["</s>", "a", "b", "c", "ab", "bc", "abc"])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(tokens, merges)), eos_token="</s>")


def test_the_vocabulary_digest_names_what_must_agree(tmp_path: Path) -> None:
    """The same after saving and loading, and whatever pads; another for other words, special tokens or merges."""
    digest = vocabulary_digest(tiny_tokenizer())
    tiny_tokenizer().save_pretrained(tmp_path)
    assert vocabulary_digest(load_tokenizer(str(tmp_path))) == digest
    unpadded = tiny_tokenizer()
    unpadded.pad_token = "</s>"
    assert vocabulary_digest(unpadded) == digest
    other_end = tiny_tokenizer()
    other_end.eos_token = "good"
    assert vocabulary_digest(other_end) != digest
    assert vocabulary_digest(tiny_tokenizer(["the"])) != digest
    assert vocabulary_digest(bpe([("a", "b"), ("ab", "c")])) != vocabulary_digest(bpe([("b", "c"), ("a", "bc")]))


def test_different_vocabularies_are_refused_with_sizes_first_difference_and_remedy() -> None:
    same, swapped, end = tiny_tokenizer(), tiny_tokenizer(["a", "the"]), tiny_tokenizer()
    check_same_vocabulary({"helpful": tiny_tokenizer(), "harmless": same})
    with pytest.raises(
        ModelError,
        match=r"'helpful' and 'harmless'.*25 and 9 tokens; first difference at id 7 \('the' and 'a'\).*Train",
    ) as caught:
        check_same_vocabulary({"helpful": same, "harmless": swapped})
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    end.eos_token = "good"
    with pytest.raises(ModelError, match=r"eos_token is '</s>' \(id 2\) and 'good' \(id 11\)\. If both"):
        check_same_vocabulary({"helpful": same, "harmless": end})
    with pytest.raises(ModelError, match="their merge rules differ"):
        check_same_vocabulary({"a": bpe([("a", "b"), ("ab", "c")]), "b": bpe([("b", "c"), ("a", "bc")])})


def test_a_padding_token_that_only_one_tokenizer_has_is_no_difference() -> None:
    """Below the rows of the output layer too, where these are more than the tokens; another new token is one."""
    plain, padded, renamed, longer = (tiny_tokenizer() for _ in range(4))
    padded.add_special_tokens({"pad_token": "<|pad|>"})
    renamed.add_special_tokens({"pad_token": "[PAD]"})
    longer.add_tokens(["<|turn|>"])
    for tokenizers in ((plain, padded), (padded, plain), (padded, renamed)):
        check_same_vocabulary(dict(zip("ab", tokenizers, strict=True)), num_ids=32)
    for other in (plain, padded):
        with pytest.raises(ModelError, match=r"first difference at id 25"):
            check_same_vocabulary({"a": other, "b": longer}, num_ids=32)
        check_same_vocabulary({"a": other, "b": longer}, num_ids=25)  # no model can draw it
