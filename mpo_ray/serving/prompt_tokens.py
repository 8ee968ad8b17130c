"""From what a client wrote to token ids: its words are words, even where they spell a special token.

`<|im_end|>` in a message would otherwise end the message and let its author speak as somebody else. The template's own
special tokens stay what they are (`data.rendering`).
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mpo_ray.data.rendering import NEEDED_KEYS, Rendering
from mpo_ray.data.text_tokens import RenderingError
from mpo_ray.records import Message, Prompt, ToolChat
from mpo_ray.serving.errors import ApiError, context_exceeded

#: Characters that a token stands for, at most: a text longer than this many times the limit is not even tokenised.
CHARACTERS_PER_TOKEN = 32


class PromptTokens:
    """Tokenises in one thread beside the event loop, with a tokenizer of its own: it is not for two threads at a time.

    longest: tokens of a prompt, at most, None for any number; context: of the model, for messages
    """

    def __init__(self, tokenizer: Any, longest: int | None, context: int | None) -> None:
        self._rendering = Rendering(copy.deepcopy(tokenizer), text="plain")
        self._longest, self._context = longest, context
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @property
    def has_chat_template(self) -> bool:
        return self._rendering.has_template

    async def of_text(self, text: str, *, add_special: bool = True) -> list[int]:
        """Ids of a prompt, after the tokenizer's own start token. Raises ApiError."""
        self._check_length(len(text), "prompt")
        read = self._rendering.prompt_ids if add_special else self._rendering.words
        return await self._in_thread(read, text, "prompt")

    async def of_chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids of messages, and the tools that go with them, in the tokenizer's chat template. Raises ApiError.

        Messages may have any keys that a template reads; null stands for no content.
        """
        if not self.has_chat_template:
            raise ApiError(400, "this model has no chat template; use /v1/completions.", "messages")
        self._check_length(sum(map(_length, [*messages, *tools])), "messages")
        chat = tuple(dict(message) for message in messages)
        prompt: Prompt = ToolChat(chat, tuple(tools)) if tools else chat
        return await self._in_thread(self._chat_ids, prompt, "messages")

    def check_number(self, number: int, param: str) -> None:
        """Raises ApiError for a prompt of more tokens than allowed."""
        if self._longest is not None and number > self._longest:
            raise context_exceeded(
                self._context or self._longest,
                f"it has {number} tokens, and at most {self._longest} are allowed.",
                param,
            )

    def _check_length(self, length: int, param: str) -> None:
        if self._longest is not None and length > CHARACTERS_PER_TOKEN * self._longest:
            raise context_exceeded(
                self._context or self._longest,
                f"it has {length} characters, which is more than {self._longest} tokens, all that are allowed.",
                param,
            )

    def _chat_ids(self, prompt: Prompt) -> list[int]:
        """Raises RenderingError also where the model would not see a tool or its call."""
        if isinstance(prompt, ToolChat) or any(key in message for message in prompt for key in NEEDED_KEYS):
            prompt, _ = self._rendering.accept(prompt)
        return self._rendering.prompt_ids(prompt)

    async def _in_thread(self, read: Any, prompt: Prompt, param: str) -> list[int]:
        try:
            ids: list[int] = await asyncio.get_running_loop().run_in_executor(self._thread, read, prompt)
        except RenderingError as error:
            raise ApiError(400, f"{error}", param) from None
        return ids


def _length(message: Message) -> int:
    """Characters of a message, in whatever keys they stand."""
    return sum(len(value if isinstance(value, str) else json.dumps(value)) for value in message.values())
