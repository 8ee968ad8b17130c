"""What a prompt and a reply are in token ids: the one place where that is decided.

Messages are what the tokenizer's chat template makes of them. Rendered with and without the reply, it says what stands
before the reply (the generation prompt, an empty block of thoughts), inside it (thoughts, tool calls) and after it: the
learned end, such as `<|im_end|>`, and not what a template writes after that. Special tokens in a message are words.

Text is rendered already, as TRL takes it: special tokens count, the tokenizer's start token and end token are added
where the text has none. `text="plain"` makes them words there too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from mpo_ray.data.chat_template import ChatTemplate
from mpo_ray.data.end_tokens import ends_of
from mpo_ray.data.text_tokens import RenderingError, TextTokens, UnknownIdError
from mpo_ray.records import Message, Prompt, Reply, ToolChat, chat_of

#: Keys without which a conversation means something else: a template that reads none of them cannot have the row.
NEEDED_KEYS = ("tool_calls", "tools")
#: Characters of a rendered text that an error shows.
NUM_SHOWN = 40


class Rendering:
    """Prompts and replies as token ids, by one tokenizer. Not for two threads at a time.

    template_values: variables of the chat template, such as `enable_thinking`: `data.chat_template_kwargs`
    text: whether a prompt that is text is rendered already, or plain words: `data.text`
    model_ends: the end tokens that the model itself names
    num_ids: how many token ids the model has rows for, if that is known; a text with another is refused
    end: the id of the token that ends a reply to messages, which training learns; of a reply to text it is the
        tokenizer's own
    ends: all ids that end a reply, in order
    unread: how many messages had a key that the chat template does not read, by key
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template_values: Mapping[str, Any] | None = None,
        text: Literal["rendered", "plain"] = "rendered",
        model_ends: Iterable[int] = (),
        num_ids: int | None = None,
    ) -> None:
        """Raises ValueError for template values that the template does not read."""
        self.tokenizer = tokenizer
        self.template_values = dict(template_values or {})
        self.unread: Counter[str] = Counter()
        self._num_ids = num_ids
        self._text, self._is_plain = TextTokens(tokenizer), text == "plain"
        named = {*model_ends, *ends_of(tokenizer)}
        self._template = ChatTemplate(self._text, self.template_values, named)
        self.end = int(tokenizer.eos_token_id if self._template.end is None else self._template.end)
        self.ends = tuple(sorted({*named, *self._template.ends, self.end}))
        # What ends a text by its place alone is found there where it is a token of its own, and no word as well.
        self._seen_ends = frozenset(self.ends) & self._text.added

    @property
    def has_template(self) -> bool:
        return self._template.exists

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt, up to where its reply begins. Raises RenderingError.

        A text that has no tokens becomes the start token, or the end token where there is none (an unconditional text).
        """
        if isinstance(prompt, str):
            ids = self._text_ids(prompt)
            return self._known(ids) or [self._text.start()]
        messages, tools, masks = self._template.words_masked(*chat_of(prompt))
        rendered = self._template.render(messages, tools, generation_prompt=True)
        return self._known(self._text.ids_and_ends(rendered, masks)[0]) or [self._text.start()]

    def ids(self, prompt: Prompt, reply: Reply, *, finished: bool = True) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of a reply to it, the reply with its end token if it is `finished`.

        Raises RenderingError, also where the prompt is no beginning of the conversation.
        """
        if isinstance(prompt, str):
            before, after = self._ids_of_text(prompt, reply, finished)
        else:
            before, after = self._ids_of_chat(prompt, reply, finished)
        return self._known(before), self._known(after)

    def words(self, text: str) -> list[int]:
        """Ids of a plain text by itself, in which nothing is a special token. Raises RenderingError."""
        return self._text.as_words(text)

    def prompt_text(self, prompt: Prompt) -> str:
        """The text that precedes a reply: the prompt as it is, or the chat template's. Raises RenderingError."""
        if isinstance(prompt, str):
            return prompt
        return self._template.render(*chat_of(prompt), generation_prompt=True)

    def accept(self, prompt: Prompt, *replies: Reply) -> tuple[Prompt, list[Reply]]:
        """A row's prompt and replies, without the keys of messages that the chat template does not read: see `unread`.

        Raises RenderingError where they have no token ids, where replies are equal as they are rendered, and for a key
        without which the conversation means something else.
        """
        if not isinstance(prompt, str):
            prompt, replies = self._without_unread(prompt, replies)
        if not replies:
            self.prompt_ids(prompt)
        rendered = [tuple(self.ids(prompt, reply)[1]) for reply in replies]
        if len(set(rendered)) < len(rendered):
            raise RenderingError("the replies are equal once they are rendered")
        return prompt, list(replies)

    def _known(self, ids: list[int]) -> list[int]:
        """The same ids. Raises UnknownIdError for one that the model has no row for."""
        unknown = None if self._num_ids is None else next((id for id in ids if id >= self._num_ids), None)
        if unknown is not None:
            token = self.tokenizer.convert_ids_to_tokens(unknown)
            raise UnknownIdError(
                f"it has the token {token!r} with the id {unknown}, and the model has rows for {self._num_ids} ids"
            )
        return ids

    def _text_ids(self, text: str) -> list[int]:
        read = self._text.as_words if self._is_plain else self._text.as_tokens
        return read(text, add_start=True)

    def _ids_of_text(self, prompt: str, reply: Reply, finished: bool) -> tuple[list[int], list[int]]:
        if not isinstance(reply, str):
            keys = ", ".join(sorted(set(reply) - {"role", "content"}))
            raise RenderingError(f"the reply has {keys}, which no chat template renders, because its prompt is text")
        before = self._text_ids(prompt)
        ids = self._reply_to_text(prompt, before, reply)
        if not before:
            before = [self._text.start()]
        if self._is_plain:
            return before, [*ids, self.tokenizer.eos_token_id] if finished else ids
        place = max((n for n, id in enumerate(ids) if id in self._seen_ends), default=None)
        if place is not None and not self.tokenizer.decode(ids[place + 1 :]).strip():
            return before, ids[: place + 1] if finished else ids[:place]
        return before, [*ids, self.tokenizer.eos_token_id] if finished else ids

    def _reply_to_text(self, prompt: str, before: Sequence[int], reply: str) -> list[int]:
        """Ids of the reply behind its prompt. A start token that a text without prompt has itself is not doubled."""
        if not prompt:
            ids = self._text_ids(reply)
            start = before or [self._text.start()]
            return ids[len(start) :] if ids[: len(start)] == list(start) else ids
        if self._is_plain:
            return self._text.as_words(reply)
        own = self._text.as_tokens(prompt)
        return self._behind(prompt, own, prompt + reply, {})

    def _ids_of_chat(
        self, prompt: tuple[Message, ...] | ToolChat, reply: Reply, finished: bool
    ) -> tuple[list[int], list[int]]:
        messages, tools = chat_of(prompt)
        masked, masked_tools, masks = self._template.words_masked([*messages, _as_message(reply)], tools)
        before = self._template.render(masked[:-1], masked_tools, generation_prompt=True)
        whole = self._template.render(masked, masked_tools, generation_prompt=False)
        if not whole.startswith(before):
            beginnings = {ord(mask): beginning for beginning, mask in masks.items()}
            raise RenderingError(_no_beginning(before.translate(beginnings), whole.translate(beginnings)))
        prompt_ids = self._text.ids_and_ends(before, masks)[0]
        ids = self._behind(before, prompt_ids, whole, masks)
        start = prompt_ids or [self._text.start()]
        place = next((n for n, id in enumerate(ids) if id in self._seen_ends), None)
        after = self._template.after
        if place is not None and finished:
            return start, ids[: place + 1]
        if after and whole.endswith(after):
            ids = self._behind(before, prompt_ids, whole.removesuffix(after), masks)
        elif place is not None:
            ids = ids[:place]
        return start, [*ids, self.end] if finished else ids

    def _behind(self, before: str, ids: Sequence[int], whole: str, masks: Mapping[str, str]) -> list[int]:
        """Ids of what follows `before` in `whole`: as they follow there, or apart where a token would span both."""
        found, ends = self._text.ids_and_ends(whole, masks)
        num = len(ids)
        parted = ends is None or num == 0 or ends[num - 1] <= len(before)
        if found[:num] == list(ids) and parted:
            return found[num:]
        return self._text.ids_and_ends(whole[len(before) :], masks)[0]

    def _without_unread(
        self, prompt: tuple[Message, ...] | ToolChat, replies: Sequence[Reply]
    ) -> tuple[Prompt, tuple[Reply, ...]]:
        messages, tools = chat_of(prompt)
        answers = [_as_message(reply) for reply in replies]
        unread = self._template.unread_keys([[*messages, answer] for answer in answers] or [messages], tools)
        if needed := next((key for key in NEEDED_KEYS if key in unread), None):
            raise RenderingError(
                f"the chat template does not read {needed!r}: the model would not see it. Use a model whose template "
                "renders tools, or leave the row out"
            )
        if not unread:
            return prompt, tuple(replies)
        self.unread.update(key for message in (*messages, *answers) for key in message if key in unread)
        kept = [{key: one for key, one in m.items() if key not in unread} for m in (*messages, *answers)]
        chat = tuple(kept[: len(messages)])
        return (ToolChat(chat, tools) if tools else chat), tuple(map(_as_reply, kept[len(messages) :]))


def _as_message(reply: Reply) -> Message:
    return {"role": "assistant", "content": reply} if isinstance(reply, str) else reply


def _as_reply(message: Message) -> Reply:
    return str(message["content"]) if set(message) == {"role", "content"} else message


def artefact_ends(generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """The end tokens of a mixture artefact, by the two that it holds; without a tokenizer those of the first."""
    ends = ends_of(generation_config)
    return tuple(sorted(ends)) if tokenizer is None else Rendering(tokenizer, model_ends=ends).ends


def _no_beginning(before: str, whole: str) -> str:
    place = next(
        (n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole))
    )
    return (
        f"the prompt is no beginning of its conversation: the chat template writes {before[place:][:NUM_SHOWN]!r} "
        f"before a reply that is to come, and {whole[place:][:NUM_SHOWN]!r} where the reply is there. Perhaps "
        "`data.chat_template_kwargs` can change that (`enable_thinking: false`), or `reasoning_content` in the reply."
    )
