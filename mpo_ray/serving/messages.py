"""The messages of a chat as clients send them, and as a chat template reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from mpo_ray.serving.neutral import NOT_IN_MESSAGES, Values
from mpo_ray.serving.request_model import Request, wrong


class CacheControl(Request):
    """A hint of Anthropic's clients: where the provider may keep a prompt. Prefixes are kept without it."""

    type: Literal["ephemeral"]
    ttl: str | None = None


class TextPart(Request):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = Field(None, description="changes nothing")


Content = str | Annotated[list[TextPart], Field(fail_fast=True)]


class CalledFunction(Request):
    name: str
    arguments: str | dict[str, Any] = Field("{}", description="a JSON object, or its text")

    @property
    def values(self) -> dict[str, Any] | None:
        """The arguments by their names; None for what is no JSON object."""
        if not isinstance(self.arguments, str):
            return self.arguments
        try:
            read = json.loads(self.arguments or "{}")
        except ValueError:
            return None
        return read if isinstance(read, dict) else None

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> CalledFunction:
        if self.values is None:
            raise wrong("arguments", f"the arguments {str(self.arguments)[:100]!r} are no JSON object")
        return self


class ToolCall(Request):
    """A call that the assistant made. index: its number in a stream"""

    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        called = {"name": self.function.name, "arguments": self.function.values}
        return ({} if self.id is None else {"id": self.id}) | {"type": self.type, "function": called}


class Message(Request):
    """What the turns of all roles share. `cache_control` and nulls are no part of what a template reads."""

    role: str
    name: str | None = None
    cache_control: CacheControl | None = Field(None, description="changes nothing")

    @property
    def text(self) -> str:
        content: Content | None = getattr(self, "content", None)
        if content is None or isinstance(content, str):
            return content or ""
        return "".join(part.text for part in content)

    def for_template(self) -> dict[str, Any]:
        """The message with the keys that it has, as chat templates read them."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.text}
        return message if self.name is None else message | {"name": self.name}


class Said(Message):
    """A turn of the system (or developer, which is the same) or of the user."""

    role: Literal["system", "developer", "user"]
    content: Content


class AssistantSaid(Message):
    """A turn of the assistant. The message of an answer can be sent back as it is."""

    not_implemented: ClassVar[Mapping[str, Values]] = NOT_IN_MESSAGES
    role: Literal["assistant"]
    content: Content | None = Field(None, description="may be missing beside tool_calls")
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> AssistantSaid:
        if self.content is None and not self.tool_calls:
            raise wrong("content", "an assistant's message has content or tool_calls")
        return self

    def for_template(self) -> dict[str, Any]:
        """Also `reasoning_content`, and `tool_calls` whose arguments are an object."""
        message = super().for_template()
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


class ToolSaid(Message):
    """What a tool that was called returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        message = super().for_template()
        return message if self.tool_call_id is None else message | {"tool_call_id": self.tool_call_id}


ROLES = {"system": "[said]", "developer": "[said]", "user": "[said]", "assistant": "[assistant]", "tool": "[tool]"}


def _kind_of(message: Any) -> str | None:
    """The tag of a message's class, which is no name of a field."""
    if not isinstance(message, dict):
        return ROLES[getattr(message, "role", "user")]
    return ROLES.get(role) if isinstance(role := message.get("role"), str) else None


ChatMessage = Annotated[
    Annotated[Said, Tag("[said]")] | Annotated[AssistantSaid, Tag("[assistant]")] | Annotated[ToolSaid, Tag("[tool]")],
    Discriminator(
        _kind_of,
        custom_error_type="role",
        custom_error_message=f"Input should be one of {', '.join(map(repr, ROLES))}",
    ),
]
Messages = Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
