"""A tokenizer's chat template: what it makes of messages and tools, what it reads of them, and how it ends a reply."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from mpo_ray.data.text_tokens import RenderingError, TextTokens
from mpo_ray.records import Message

#: What stands in the place of a reply to see what a template writes around it.
PROBE = "\uf8ff"
#: What `apply_chat_template` takes for itself, so that no template can be given it.
TAKEN = (
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
)


class ChatTemplate:
    """Raises ValueError for values that no template can be given, or that this one does not read.

    values: further variables of the template, such as `enable_thinking`
    end: the id of the token by which it ends a reply, None where it writes none
    after: the text that it writes after the words of a reply
    """

    def __init__(self, text: TextTokens, values: Mapping[str, Any]) -> None:
        self._text, self._values = text, dict(values)
        self._source = _source(getattr(text.tokenizer, "chat_template", None))
        for name in values:
            if name in TAKEN or not name.isidentifier():
                raise ValueError(f"chat_template_kwargs: {name!r} cannot be set for a chat template; leave it out.")
            if not self.reads(name):
                found = "there is no chat template" if self._source is None else "the chat template does not read it"
                raise ValueError(f"chat_template_kwargs: {name!r}: {found}; correct the name or leave it out.")
        self.end, self.after = self._ending()

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
                f"the prompt {str(messages[0].get('content', ''))[:80]!r} is a list of chat messages, but the "
                "tokenizer has no chat template; use plain string prompts, or a model whose tokenizer has one."
            )
        try:
            return str(
                self._text.tokenizer.apply_chat_template(
                    [_as_templates_have_it(message) for message in messages],
                    tools=[dict(tool) for tool in tools] or None,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    **self._values,
                )
            )
        except TemplateError as error:
            raise RenderingError(f"the chat template refuses these messages: {error}") from error
        except Exception as error:
            raise RenderingError(
                f"the chat template cannot render these messages: {type(error).__name__}: {error}"
            ) from error

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

    def _ending(self) -> tuple[int | None, str]:
        conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        try:
            whole = self.render(conversation, (), generation_prompt=False)
        except RenderingError:
            return None, ""
        after = whole.rpartition(PROBE)[2] if PROBE in whole else ""
        ids = self._text.as_tokens(after)
        return next((id for id in ids if id in self._text.added), None), after


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


def _as_templates_have_it(message: Message) -> dict[str, Any]:
    """Content is a text, and the arguments of a call are values: clients of OpenAI's API write them as JSON text."""
    found = dict(message)
    if found.get("content") is None:
        found["content"] = ""
    if isinstance(calls := found.get("tool_calls"), list | tuple):
        found["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    return found


def _with_parsed_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
