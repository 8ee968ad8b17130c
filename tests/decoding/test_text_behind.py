"""A completion's text behind its prompt: what decode(prompt + completion) has after the prompt's, space and all."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mpo_ray.decoding.text_stream import TextStream, text_behind
from tests.serving.live import byte_tokenizer
from tests.tiny import tiny_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's is arranged: words begin with ▁, characters that it does not know are bytes."""
    words = ["<s>", "</s>", "<unk>", "▁", "▁the", "▁staff", "▁was", "bor", "ing", "."]
    core = Tokenizer(
        models.BPE({token: id for id, token in enumerate([*words, *BYTES])}, [], unk_token="<unk>", byte_fallback=True)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "[CLS]", "the", "staff", "was", "bor", "##ing", "."]
    core = Tokenizer(models.WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="[CLS]", unk_token="[UNK]")


def ids_of(tokenizer: Any, *tokens: str) -> list[int]:
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]


CASES = {
    "words": (tiny_tokenizer(), ["<s>", "the", "film", "was", "good", "and", "long"]),
    "sentencepiece": (
        sentencepiece(),
        [
            "<s>",
            "▁the",
            "▁staff",
            "▁was",
            "▁",
            "bor",
            "ing",
            "▁",
            "<0xE2>",
            "<0x82>",
            "<0xAC>",
            "<0xC3>",
            "<0xA9>",
            ".",
        ],
    ),
    "wordpiece": (wordpiece(), ["[CLS]", "the", "staff", "was", "bor", "##ing", "the", "."]),
    "bytes": (byte_tokenizer(), ["<s>", "a", "Ġ", "b", "Ã©", "âĤ", "¬", "c"]),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_completion_is_what_the_whole_text_has_behind_the_prompt(kind: str) -> None:
    """Wherever the text is cut: prompt and completion together are the text, all at once or token by token."""
    tokenizer, tokens = CASES[kind]
    ids = ids_of(tokenizer, *tokens)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    for cut in range(1, len(ids) + 1):
        prompt = tokenizer.decode(ids[:cut], skip_special_tokens=True)
        text = text_behind(tokenizer, ids[:cut], ids[cut:])
        stream = TextStream(tokenizer, prompt_ids=ids[:cut])
        pieces = [stream.push(token) for token in ids[cut:]]
        assert "".join(pieces) + stream.finish() == text
        if not prompt.endswith("\ufffd"):  # it was not cut within a character
            assert prompt + text == whole, cut
        else:
            assert text
            assert whole.endswith(text)


@pytest.mark.parametrize("kind", CASES)
def test_a_reply_stands_alone(kind: str) -> None:
    tokenizer, tokens = CASES[kind]
    ids = ids_of(tokenizer, *tokens[1:])
    assert text_behind(tokenizer, (), ids) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_long_run_of_parts_of_characters_is_behind_its_prompt_too() -> None:
    """The prompt is looked at from a whole character on, however far back that is."""
    tokenizer = sentencepiece()
    euros = [f"<0x{byte:02X}>" for byte in "€".encode()] * 5
    ids = ids_of(tokenizer, "▁the", *euros, "▁was")
    assert text_behind(tokenizer, ids[:-1], ids[-1:]) == " was"
    assert text_behind(tokenizer, ids[:-4], ids[-4:]) == "€ was"


def test_a_stop_string_is_found_behind_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer, [" good"], ids_of(tokenizer, "the", "film"))
    pieces = [stream.push(token) for token in ids_of(tokenizer, "was", "good")]
    assert ("".join(pieces), stream.found) == (" was", " good")
