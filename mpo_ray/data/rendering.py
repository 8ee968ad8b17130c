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
from mpo_ray.data.fields import Rendered
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
        before, (after,) = self.ids_of_replies(prompt, [reply], finished=[finished])
        return before, after

    def ids_of_replies(
        self, prompt: Prompt, replies: Sequence[Reply], *, finished: Sequence[bool]
    ) -> tuple[list[int], list[list[int]]]:
        """As `ids`, of one prompt and one or more replies to it: the prompt is rendered once for all of them."""
        if isinstance(prompt, str):
            before, afters = self._ids_of_text(prompt, replies, finished)
        else:
            before, afters = self._ids_of_chat(prompt, replies, finished)
        return self._known(before), [self._known(after) for after in afters]

    def words(self, text: str) -> list[int]:
        """Ids of a plain text by itself, in which nothing is a special token. Raises RenderingError."""
        return self._text.as_words(text)

    def prompt_text(self, prompt: Prompt) -> str:
        """The text that precedes a reply: the prompt as it is, or the chat template's. Raises RenderingError."""
        if isinstance(prompt, str):
            return prompt
        return self._template.render(*chat_of(prompt), generation_prompt=True)

    def accept(self, prompt: Prompt, *replies: Reply) -> tuple[Prompt, list[Reply]]:
        """What `rendered` keeps of a row's prompt and replies, without their ids. Raises RenderingError."""
        found = self.rendered(prompt, *replies)
        return found.prompt, found.replies

    def rendered(self, prompt: Prompt, *replies: Reply, cut: Sequence[bool] = ()) -> Rendered:
        """A row's prompt and replies, without the keys of messages that the chat template does not read: see `unread`.

        cut: of each reply, whether it was cut at a limit and gets no end token; none if absent
        Raises RenderingError where they have no token ids, where replies are equal as they are rendered, and for a key
        without which the conversation means something else.
        """
        if not isinstance(prompt, str):
            prompt, replies = self._without_unread(prompt, replies)
        if not replies:
            return Rendered(prompt, [], self.prompt_ids(prompt), [])
        before, afters = self.ids_of_replies(prompt, replies, finished=[True] * len(replies))
        if len(set(map(tuple, afters))) < len(afters):
            raise RenderingError("the replies are equal once they are rendered")
        if any(cut):
            before, afters = self.ids_of_replies(prompt, replies, finished=[not one for one in cut])
        return Rendered(prompt, list(replies), before, afters)

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

    def _ids_of_text(
        self, prompt: str, replies: Sequence[Reply], finished: Sequence[bool]
    ) -> tuple[list[int], list[list[int]]]:
        before = self._text_ids(prompt)
        own = self._text.as_tokens(prompt) if prompt and not self._is_plain else []
        afters = [
            self._ended(self._reply_to_text(prompt, before, own, _as_text(reply)), whole)
            for reply, whole in zip(replies, finished, strict=True)
        ]
        return before or [self._text.start()], afters

    def _ended(self, ids: list[int], finished: bool) -> list[int]:
        """Ids of a reply to text with the end token that it has itself, or with the tokenizer's."""
        if self._is_plain:
            return [*ids, self.tokenizer.eos_token_id] if finished else ids
        place = max((n for n, id in enumerate(ids) if id in self._seen_ends), default=None)
        if place is not None and not self.tokenizer.decode(ids[place + 1 :]).strip():
            return ids[: place + 1] if finished else ids[:place]
        return [*ids, self.tokenizer.eos_token_id] if finished else ids

    def _reply_to_text(self, prompt: str, before: Sequence[int], own: Sequence[int], reply: str) -> list[int]:
        """Ids of the reply behind its prompt. A start token that a text without prompt has itself is not doubled.

        before, own: ids of the prompt, with its start token and without one that it does not spell
        """
        if not prompt:
            ids = self._text_ids(reply)
            start = before or [self._text.start()]
            return ids[len(start) :] if ids[: len(start)] == list(start) else ids
        if self._is_plain:
            return self._text.as_words(reply)
        return self._behind(prompt, own, prompt + reply, {})

    def _ids_of_chat(
        self, prompt: tuple[Message, ...] | ToolChat, replies: Sequence[Reply], finished: Sequence[bool]
    ) -> tuple[list[int], list[list[int]]]:
        messages, tools = chat_of(prompt)
        known: dict[tuple[str, ...], tuple[str, list[int]]] = {}  # the masks of a conversation → its rendered prompt
        afters = []
        for reply, is_finished in zip(replies, finished, strict=True):
            masked, masked_tools, masks = self._template.words_masked([*messages, _as_message(reply)], tools)
            key = tuple(masks.values())
            if key not in known:
                text = self._template.render(masked[:-1], masked_tools, generation_prompt=True)
                known[key] = text, self._text.ids_and_ends(text, masks)[0]
            whole = self._template.render(masked, masked_tools, generation_prompt=False)
            afters.append(self._reply_to_chat(*known[key], whole, masks, is_finished))
        prompt_ids = next(iter(known.values()))[1]
        return prompt_ids or [self._text.start()], afters

    def _reply_to_chat(
        self, before: str, prompt_ids: Sequence[int], whole: str, masks: Mapping[str, str], finished: bool
    ) -> list[int]:
        """Ids of what the template writes of a reply. before, whole: the masked conversation without and with it"""
        if not whole.startswith(before):
            beginnings = {ord(mask): beginning for beginning, mask in masks.items()}
            raise RenderingError(_no_beginning(before.translate(beginnings), whole.translate(beginnings)))
        ids = self._behind(before, prompt_ids, whole, masks)
        place = next((n for n, id in enumerate(ids) if id in self._seen_ends), None)
        after = self._template.after
        if place is not None and finished:
            return ids[: place + 1]
        if after and whole.endswith(after):
            ids = self._behind(before, prompt_ids, whole.removesuffix(after), masks)
        elif place is not None:
            ids = ids[:place]
        return [*ids, self.end] if finished else ids

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


def _as_text(reply: Reply) -> str:
    """A reply to text. Raises RenderingError for one that is a message."""
    if isinstance(reply, str):
        return reply
    keys = ", ".join(sorted(set(reply) - {"role", "content"}))
    raise RenderingError(f"the reply has {keys}, which no chat template renders, because its prompt is text")


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
