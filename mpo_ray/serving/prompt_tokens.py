"""From what a client wrote to token ids: its words are words, even where they spell a special token.

`<|im_end|>` in a message would otherwise end the message and let its author speak as somebody else. The template's own
special tokens stay what they are.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jinja2 import TemplateError

from mpo_ray.serving.errors import ApiError

#: Characters that a token stands for, at most: a text longer than this many times the limit is not even tokenised.
CHARACTERS_PER_TOKEN = 32

Message = Mapping[str, str]


class PromptTokens:
    """Tokenises in one thread beside the event loop, with a tokenizer of its own: it is not for two threads at a time.

    longest: tokens of a prompt, at most, None for any number; context: of the model, for messages
    """

    def __init__(self, tokenizer: Any, longest: int | None, context: int | None) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._longest, self._context = longest, context
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._special = frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        added = tokenizer.added_tokens_decoder
        self._special |= {id for id, token in added.items() if token.special and id != tokenizer.unk_token_id}
        self._beginnings = frozenset(str(token)[0] for id, token in added.items() if id in self._special)

    async def of_text(self, text: str, *, add_special: bool = True) -> list[int]:
        """Ids of a prompt, after the tokenizer's own start token. Raises ApiError."""
        self._check_length(len(text), "prompt")
        return await self._in_thread(self._text_ids, text, add_special)

    async def of_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of messages in the tokenizer's chat template. Raises ApiError."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise ApiError(400, "this model has no chat template; use /v1/completions.", "messages")
        self._check_length(sum(len(message["content"]) for message in messages), "messages")
        return await self._in_thread(self._chat_ids, messages)

    def check_number(self, number: int, param: str) -> None:
        """Raises ApiError for a prompt of more tokens than allowed."""
        if self._longest is not None and number > self._longest:
            raise ApiError(
                400,
                f"the prompt has {number} tokens, and at most {self._longest} are allowed; the model's context is "
                f"{self._context} tokens.",
                param,
                "context_length_exceeded",
            )

    def _check_length(self, length: int, param: str) -> None:
        if self._longest is not None and length > CHARACTERS_PER_TOKEN * self._longest:
            raise ApiError(
                400,
                f"the prompt has {length} characters, which is more than {self._longest} tokens, all that are allowed.",
                param,
                "context_length_exceeded",
            )

    async def _in_thread(self, function: Any, *arguments: Any) -> list[int]:
        ids: list[int] = await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        return ids

    def _text_ids(self, text: str, add_special: bool) -> list[int]:
        encoded = self._tokenizer(
            text,
            add_special_tokens=add_special,
            split_special_tokens=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        pairs = list(zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True))
        ids = [id if added else self._as_word(id) for id, added in pairs]
        eos = self._tokenizer.eos_token_id
        if pairs[-1:] == [(eos, 1)]:
            ids = ids[:-1]  # some tokenizers end every text
        if add_special and not ids:
            start = self._tokenizer.bos_token_id
            ids = [eos if start is None else start]
        return ids

    def _as_word(self, id: int) -> int:
        """A special token that the words of a text spell, where the vocabulary knows it as a word as well."""
        if id not in self._special:
            return id
        unknown = self._tokenizer.unk_token_id
        if unknown is None:
            token = self._tokenizer.convert_ids_to_tokens(id)
            raise ApiError(400, f"this tokenizer cannot write {token!r} as text; leave it out.", "prompt")
        return int(unknown)

    def _chat_ids(self, messages: Sequence[Message]) -> list[int]:
        plain = self._ids_of(self._render(messages))
        contents = "".join(message["content"] for message in messages)
        if self._beginnings.isdisjoint(contents):
            return plain
        masks = dict(zip(sorted(self._beginnings), _unused_characters(contents), strict=False))
        if len(masks) < len(self._beginnings):
            raise ApiError(400, "the messages use every character of Unicode's private use area.", "messages")
        masked = self._render([{**one, "content": one["content"].translate(_table(masks))} for one in messages])
        if self._specials_among(plain) == self._specials_among(self._ids_of(masked)):
            return plain
        return list(self._unmasked(masked, {mask: beginning for beginning, mask in masks.items()}))

    def _unmasked(self, masked: str, beginnings: Mapping[str, str]) -> Iterator[int]:
        """Ids of a rendered chat in which no content spells a special token: its specials are the template's.

        What stands between them is tokenised by itself, with the masked characters restored.
        """
        encoded = self._tokenizer(masked, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        place = 0
        specials = [
            (id, span)
            for id, span in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            if id in self._special
        ]
        for id, (start, end) in [*specials, (None, (len(masked), len(masked)))]:
            words = masked[place:start].translate(_table(beginnings))
            if words:
                yield from self._text_ids(words, False)
            if id is not None:
                yield id
            place = end

    def _render(self, messages: Sequence[Message]) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(one) for one in messages], tokenize=False, add_generation_prompt=True
                )
            )
        except TemplateError as error:  # what a template says by raise_exception is for whoever wrote the messages
            raise ApiError(400, f"the chat template refuses these messages: {error}", "messages") from None
        except Exception as error:
            raise ApiError(400, "the chat template cannot render these messages.", "messages") from error

    def _ids_of(self, rendered: str) -> list[int]:
        return list(
            self._tokenizer(rendered, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]
        )

    def _specials_among(self, ids: Sequence[int]) -> list[int]:
        return [id for id in ids if id in self._special]


def _table(characters: Mapping[str, str]) -> dict[int, str]:
    return {ord(one): other for one, other in characters.items()}


def _unused_characters(text: str) -> Iterator[str]:
    """Characters of Unicode's private use that the text does not have."""
    return (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
