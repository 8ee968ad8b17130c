"""A tokenizer's chat template: what it makes of messages and tools, what it reads of them, and how it ends a reply."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from mpo_ray.data.text_tokens import RenderingError, TextTokens
from mpo_ray.records import Message

#: What stands in the place of a reply to see what a template writes around it.
PROBE = "\uf8ff"
PROBE_USER: Message = {"role": "user", "content": "a"}
PROBE_TOOL = {"type": "function", "function": {"name": "f", "description": "f", "parameters": {"type": "object"}}}
PROBE_CALLING: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}],
}
#: What `apply_chat_template` takes for itself, so that no template can be given it.
TAKEN = (
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
)


class ChatTemplate:
    """Raises ValueError for values that no template can be given, or that this one does not read.

    values: further variables of the template, such as `enable_thinking`; ends: the end tokens that the model and the
    tokenizer name
    end: the id of the token by which it ends a reply, None where it writes none
    ends: `end`, and what it writes in its place behind calls of tools
    after: the text that it writes after the words of a reply
    """

    def __init__(self, text: TextTokens, values: Mapping[str, Any], ends: Collection[int]) -> None:
        self._text, self._values, self._in_parts = text, dict(values), False
        self._source = _source(getattr(text.tokenizer, "chat_template", None))
        for name in values:
            if name in TAKEN or not name.isidentifier():
                raise ValueError(f"chat_template_kwargs: {name!r} cannot be set for a chat template; leave it out.")
            if not self.reads(name):
                found = "there is no chat template" if self._source is None else "the chat template does not read it"
                raise ValueError(f"chat_template_kwargs: {name!r}: {found}; correct the name or leave it out.")
        self.after = self._probe()
        self.end = self._end_in(self.after, ends)
        self.ends = {end for end in (self.end, self._end_of_calls(ends)) if end is not None}

    @property
    def exists(self) -> bool:
        return self._source is not None

    def reads(self, name: str) -> bool:
        """Whether the template's source has the name."""
        return self._source is not None and re.search(rf"\b{re.escape(name)}\b", self._source) is not None

    def render(self, messages: Sequence[Message], tools: Sequence[Any], *, generation_prompt: bool) -> str:
        """The text of the conversation; with `generation_prompt` what stands before a reply as well.

        Raises RenderingError with the template's own words where it refuses them.
        """
        if self._source is None:
            raise RenderingError(
                "the prompt is a list of chat messages, and the tokenizer has no chat template: it begins "
                f"{str(messages[0].get('content', ''))[:80]!r}. Use plain string prompts, or a model whose tokenizer "
                "has a template."
            )
        given = [self._as_read(message) for message in messages]
        try:
            return self._rendered(given, tools, generation_prompt)
        except Exception as error:
            if any(message.get("tool_calls") for message in given):  # some want the arguments of a call as JSON text
                with contextlib.suppress(Exception):
                    return self._rendered([_with_arguments_as_text(m) for m in given], tools, generation_prompt)
            if isinstance(error, TemplateError):
                raise RenderingError(f"the chat template refuses these messages: {error}") from error
            kind = type(error).__name__
            raise RenderingError(f"the chat template cannot render these messages: {kind}: {error}") from error

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Any], generation_prompt: bool) -> str:
        return str(
            self._text.tokenizer.apply_chat_template(
                list(messages),
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self._values,
            )
        )

    def words_masked(
        self, messages: Sequence[Message], tools: Sequence[Any]
    ) -> tuple[list[Message], list[Any], dict[str, str]]:
        """Messages and tools whose words spell no special token, and the masks; none where nothing need be masked."""
        given: tuple[list[Message], list[Any]] = [dict(message) for message in messages], [dict(tool) for tool in tools]
        masks = self._text.masks(given)
        masked: tuple[list[Message], list[Any]] = (
            [
                {key: one if key == "role" else self._text.masked(one, masks) for key, one in message.items()}
                for message in given[0]
            ],
            self._text.masked(given[1], masks),
        )
        if masked == given or self._specials_of(*masked) == self._specials_of(*given):
            return *given, {}
        return *masked, masks

    def _specials_of(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[int]:
        ids = self._text.as_tokens(self.render(messages, tools, generation_prompt=False))
        return [id for id in ids if id in self._text.special]

    def unread_keys(self, conversations: Sequence[Sequence[Message]], tools: Sequence[Any]) -> set[str]:
        """The keys of messages, and `tools`, that the template never names and that change nothing it writes."""
        keys = {key for messages in conversations for message in messages for key in message} - {"role", "content"}
        unknown = {key for key in keys | ({"tools"} if tools else set()) if not self.reads(key)}
        return {key for key in unknown if not any(self._changes(key, messages, tools) for messages in conversations)}

    def _changes(self, key: str, messages: Sequence[Message], tools: Sequence[Any]) -> bool:
        others = [{name: one for name, one in message.items() if name != key} for message in messages]
        without = self.render(others, () if key == "tools" else tools, generation_prompt=False)
        return self.render(messages, tools, generation_prompt=False) != without

    def _as_read(self, message: Message) -> dict[str, Any]:
        """Content is a text, or its one part where the template reads parts; the arguments of a call are values."""
        found = dict(message)
        text = "" if found.get("content") is None else found["content"]
        found["content"] = [{"type": "text", "text": text}] if self._in_parts and isinstance(text, str) else text
        if isinstance(calls := found.get("tool_calls"), list | tuple):
            found["tool_calls"] = [_with_arguments(call, _parsed) for call in calls]
        return found

    def _probe(self) -> str:
        """What stands after the words of a reply. Finds out on the way whether the template reads contents in parts."""
        for self._in_parts in (False, True):
            whole = self._try([PROBE_USER, {"role": "assistant", "content": PROBE}])
            if PROBE in whole:
                return whole.rpartition(PROBE)[2]
        self._in_parts = False
        return ""

    def _end_in(self, after: str, ends: Collection[int]) -> int | None:
        """Of the first tokens of their own that stand together, one that is known to end a text, else the first."""
        ids = self._text.as_tokens(after)
        rest = itertools.dropwhile(lambda id: id not in self._text.added, ids)
        together = list(itertools.takewhile(lambda id: id in self._text.added, rest))
        return next((id for id in together if id in ends), together[0] if together else None)

    def _end_of_calls(self, ends: Collection[int]) -> int | None:
        """What ends a message with a call where that is another token than ends a reply."""
        if self.end is None or not self.reads("tool_calls"):
            return None
        whole = self._try([PROBE_USER, PROBE_CALLING], [PROBE_TOOL])
        before = self._try([PROBE_USER], [PROBE_TOOL], generation_prompt=True)
        ids = self._text.as_tokens(whole.removeprefix(before).rstrip())
        if not ids or any(id in ids for id in (self.end, *ends)) or ids[-1] not in self._text.added:
            return None
        return ids[-1]

    def _try(self, messages: Sequence[Message], tools: Sequence[Any] = (), *, generation_prompt: bool = False) -> str:
        try:
            return self.render(messages, tools, generation_prompt=generation_prompt)
        except RenderingError:
            return ""


def with_defaults(template: Any, values: Mapping[str, Any]) -> Any:
    """A chat template, or several by name, that takes `values` for its variables where it is given no others."""
    if not values or template is None:
        return template
    if isinstance(template, Mapping):
        return {name: with_defaults(one, values) for name, one in template.items()}
    given = (
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in values.items()
    )
    return f"{''.join(given)}{template}"


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _source(template: Any) -> str | None:
    """Everything that a template, or several by name, says; None for none."""
    if not template:
        return None
    return "\n".join(map(str, template.values())) if isinstance(template, Mapping) else str(template)


def _with_arguments_as_text(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_with_arguments(call, _written) for call in calls]}


def _with_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "arguments" not in function:
        return call
    return {**call, "function": {**function, "arguments": change(function["arguments"])}}


def _parsed(arguments: Any) -> Any:
    """The object that a JSON text is, as clients of OpenAI's API write arguments; anything else as it is."""
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


def _written(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
