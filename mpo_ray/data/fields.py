"""What a field of a row may hold: texts, chat messages, transcripts and numbers, or the reason why a row is bad."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol
from uuid import UUID

from mpo_ray.records import Message, Prompt, Reply, ToolChat, chat_of

#: What opens the assistant's turn in a transcript that is one string (the form of HH-RLHF), and what opens the human's.
ASSISTANT_TURN = "\n\nAssistant:"
HUMAN_TURN = "\n\nHuman:"

#: What a message of the assistant says beside its content.
SAYING = frozenset(("tool_calls", "reasoning_content", "reasoning", "thinking"))

#: What OpenAI's two interfaces call a part of a content that is text.
TEXT_PARTS = ("text", "input_text", "output_text")

Values = Mapping[str, Any]


class BadFieldError(ValueError):
    """A row is bad; the message is the `reason` of its Refusal."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """What is kept of a row's prompt and replies, and their token ids; without ids where nobody rendered them.

    A reply's ids have its end token where it is not cut.
    """

    prompt: Prompt
    replies: list[Reply]
    prompt_ids: list[int]
    reply_ids: list[list[int]]


class Accept(Protocol):
    """Looks at a row's prompt and replies. cut: of each reply, whether it was cut at a limit; none if absent.

    Raises BadFieldError where they cannot be used.
    """

    def __call__(self, prompt: Prompt, *replies: Reply, cut: Sequence[bool] = ()) -> Rendered: ...


def accept_all(prompt: Prompt, *replies: Reply, cut: Sequence[bool] = ()) -> Rendered:
    return Rendered(prompt, list(replies), [], [[] for _ in replies])


def read_text(values: Values, name: str) -> str:
    """A text that is more than white space, exactly as written."""
    return _check_text(values.get(name), f"field {name!r}")


def read_prompt(values: Values) -> Prompt:
    """The field `prompt`: a text, or chat messages of which the last is not the assistant's, with the row's `tools`."""
    if not isinstance(values.get("prompt"), list):
        return read_text(values, "prompt")
    messages = _check_messages(values["prompt"], "field 'prompt'")
    if messages[-1]["role"] == "assistant":
        raise BadFieldError("field 'prompt' ends with an assistant message")
    return with_tools(messages, values)


def read_reply(values: Values, name: str, prompt: Prompt) -> tuple[Prompt, Reply]:
    """A reply to `prompt`: a text, or chat messages that end with the assistant's.

    Messages before the last must repeat the prompt; they then are the prompt, as it may be given as bare text.
    """
    if not isinstance(values.get(name), list):
        return with_tools(prompt, values), read_text(values, name)
    before, reply = _split_last(values[name], f"field {name!r}")
    if not before or (not isinstance(prompt, str) and before == chat_of(prompt)[0]):
        return with_tools(prompt, values), reply
    if isinstance(prompt, str) and before[-1]["content"] == prompt:
        return with_tools(before, values), reply
    raise BadFieldError(f"field {name!r} begins with messages that are not the prompt")


def read_transcripts(values: Values) -> tuple[Prompt, Reply, Reply]:
    """The fields `chosen` and `rejected` as whole transcripts: their common prompt and the two last replies.

    Strings are cut after the last turn marker of their common prefix; what follows it, its leading space too, is the
    reply.
    """
    chosen, rejected = values.get("chosen"), values.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        before, chosen_reply = _split_last(chosen, "field 'chosen'")
        other, rejected_reply = _split_last(rejected, "field 'rejected'")
        if not before:
            raise BadFieldError("a transcript without a prompt: its only message is the reply")
        if before != other:
            raise BadFieldError("the transcripts part before their last turn")
        return with_tools(before, values), chosen_reply, rejected_reply
    chosen, rejected = read_text(values, "chosen"), read_text(values, "rejected")
    marker = _common_prefix(chosen, rejected).rfind(ASSISTANT_TURN)
    if marker < 0:
        raise BadFieldError(f"no turn marker in what the transcripts have in common: {ASSISTANT_TURN!r}")
    cut = marker + len(ASSISTANT_TURN)
    if HUMAN_TURN in chosen[cut:] or HUMAN_TURN in rejected[cut:]:
        raise BadFieldError("the transcripts part before their last turn")
    replies = {"chosen": chosen[cut:], "rejected": rejected[cut:]}
    for name, reply in replies.items():
        _check_text(reply, f"the reply in {name!r}")
    return chosen[:cut], replies["chosen"], replies["rejected"]


@dataclass(frozen=True, slots=True)
class Turns:
    """A conversation's turns of the assistant, each with all messages before it, and why others are not learned."""

    learned: list[tuple[Prompt, Reply]]
    left_out: list[str]


def read_turns(values: Values) -> Turns:
    """Every turn of the assistant in the field `messages`.

    Left out are a turn that opens the conversation, as it replies to nothing, and one whose message has `weight` 0, as
    fine-tuning files write it. Both stay in the prompts of later turns.
    """
    what = "field 'messages'"
    given = values.get("messages")
    if not isinstance(given, list):
        raise BadFieldError(f"{what} is no list of chat messages: {_shorten(given)}")
    messages = [dict(message) if isinstance(message, Mapping) else message for message in given]
    weights = [message.pop("weight", None) if isinstance(message, dict) else None for message in messages]
    roles = [message["role"] for message in _check_messages(messages, what)]
    if ("assistant", "assistant") in itertools.pairwise(roles):
        raise BadFieldError(f"{what} has two assistant messages in a row")
    turns = Turns([], [])
    for place, role in enumerate(roles):
        if role != "assistant":
            continue
        if set(roles[:place]) <= {"system"}:
            turns.left_out.append("assistant turns that open a conversation")
        elif weights[place] is not None and read_number({"weight": weights[place]}, "weight") == 0:
            turns.left_out.append("assistant turns of weight 0")
        else:
            before, reply = _split_last(messages[: place + 1], what)
            turns.learned.append((with_tools(before, values), reply))
    if not turns.learned:
        raise BadFieldError(f"{what} has no turn of the assistant to learn")
    return turns


def read_opening(values: Values) -> Prompt:
    """The prompt in the field `messages`: all of them, less the assistant's turn that ends them where one does."""
    given = values.get("messages")
    if not isinstance(given, list):
        raise BadFieldError(f"field 'messages' is no list of chat messages: {_shorten(given)}")
    messages = _check_messages(given, "field 'messages'")
    prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not prompt or prompt[-1]["role"] == "assistant":
        raise BadFieldError("field 'messages' has no prompt before the assistant's last message")
    return with_tools(prompt, values)


def with_tools(prompt: Prompt, values: Values) -> Prompt:
    """A prompt with the field `tools`, which goes with chat messages alone."""
    tools = _read_tools(values)
    if values.get("chat_template_kwargs") and not isinstance(prompt, str):
        raise BadFieldError(
            "field 'chat_template_kwargs' is not read row by row. Set data.chat_template_kwargs in the run file, for "
            "all rows alike, and leave the column out"
        )
    if tools and isinstance(prompt, str):
        raise BadFieldError(
            "field 'tools' goes with chat messages, and the prompt is text. Give the column another name by `rename:` "
            "if the text has them already"
        )
    return ToolChat(chat_of(prompt)[0], tools) if tools and not isinstance(prompt, str) else prompt


def _read_tools(values: Values) -> tuple[Mapping[str, Any], ...]:
    """The field `tools`: a list of objects, or such a list in JSON; none where it is missing or empty."""
    given = values.get("tools")
    if is_missing(given):
        return ()
    found = given
    if isinstance(given, str):
        try:
            found = json.loads(given)
        except ValueError:
            found = None
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise BadFieldError(f"field 'tools' is no list of tools: {_shorten(given)}")
    return tuple(_plain(tool, f"tool {number}") for number, tool in enumerate(found, 1))


def _common_prefix(first: str, second: str) -> str:
    differ = (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return first[: next(differ, min(len(first), len(second)))]


def read_number(values: Values, name: str) -> float | None:
    """A finite number, also written as text (CSV); None where there is none."""
    value = values.get(name)
    if is_missing(value):
        return None
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BadFieldError(f"field {name!r} is not a finite number: {value!r}")
    return number


def read_id(values: Values) -> str | None:
    """The field `id`, a text or a whole number, as text; None where there is none.

    A whole number may be stored as a float, as pandas does where some rows have none, or as a decimal, as databases do.
    """
    value = values.get("id")
    if is_missing(value):
        return None
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, UUID):
        return str(value)
    if not isinstance(value, str):
        raise BadFieldError(f"field 'id' is neither text nor a whole number: {type(value).__name__} {_shorten(value)}")
    return _check_text(value, "field 'id'")


def is_missing(value: object) -> bool:
    """Whether a cell is empty: null, the empty text of a CSV file, or NaN, which some writers of Parquet put there."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _check_text(value: object, what: str) -> str:
    if value is None:
        raise BadFieldError(f"{what} is missing")
    if not isinstance(value, str):
        raise BadFieldError(f"{what} is not text: {type(value).__name__} {_shorten(value)}")
    if not value.strip():
        raise BadFieldError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadFieldError(
            f"{what} cannot be written as UTF-8: lone surrogate at character {error.start + 1}"
        ) from None
    return value


def _check_messages(value: list[Any], what: str) -> tuple[Message, ...]:
    if not value:
        raise BadFieldError(f"{what} is empty")
    return tuple(_check_message(message, f"message {number} of {what}") for number, message in enumerate(value, 1))


def _check_message(message: Any, place: str) -> Message:
    """A message with all its keys but those that are null: a table has a cell for each key that any message has."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadFieldError(f"{place} is no chat message: it needs role and content, and is {_shorten(message)}")
    given = {str(key): value for key, value in message.items() if value is not None and value != []}
    content, role = given.pop("content", None), given.pop("role")
    further = {key: _plain(value, f"{key!r} of {place}") for key, value in given.items()}
    calls = further.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise BadFieldError(f"'tool_calls' of {place} is no list of calls: {_shorten(calls)}")
    # An assistant that calls or thinks need not speak, a tool may return nothing, a system prompt may be left empty.
    may_be_empty = (role == "assistant" and not SAYING.isdisjoint(further)) or (
        role in ("system", "tool") and content == ""
    )
    if not content and may_be_empty:
        return {"role": role, "content": "", **further}
    return {"role": role, "content": _check_text(_joined(content, place), f"the content of {place}"), **further}


def _joined(content: Any, place: str) -> Any:
    """The text of a content that is a list of parts, as OpenAI's clients write it; anything else as it is."""
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return content
    for number, part in enumerate(content, 1):
        if part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise BadFieldError(
                f"part {number} of the content of {place} is no text but {part.get('type')!r}; only models of text are "
                "trained here"
            )
    return "".join(part["text"] for part in content)


def _plain(value: Any, what: str) -> Any:
    """A JSON value. Raises BadFieldError for what no file of JSON holds."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise BadFieldError(f"{what} is no JSON value: {error}") from None
    return value


def _split_last(value: list[Any], what: str) -> tuple[tuple[Message, ...], Reply]:
    """The messages before the last, and the last, which is the assistant's: its content where it has nothing else."""
    messages = _check_messages(value, what)
    *before, last = messages
    if last["role"] != "assistant":
        raise BadFieldError(f"{what} does not end with an assistant message")
    if before and before[-1]["role"] == "assistant":
        raise BadFieldError(f"{what} ends with two assistant messages")
    return tuple(before), str(last["content"]) if set(last) == {"role", "content"} else last


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
