"""The nouns of the project: what a preference, a prompt and a completion are, as immutable records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: A chat message: `role`, `content` and whatever else a chat template reads of it, as JSON values.
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolChat:
    """Chat messages, and the tools that the assistant may call, as JSON values."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]


#: A prompt is a plain string, used as it is, or chat messages, rendered with the tokenizer's chat template.
Prompt = str | tuple[Message, ...] | ToolChat
#: A reply is its text, or the assistant's message where that says more than its content.
Reply = str | Message

#: The name that stands for π_ref among the proposals of a sample table and the candidates of an evaluation.
REFERENCE = "reference"
#: The other candidates of an evaluation that a run names itself: mixtures and soups, at uniform and at fitted weights,
#: MPO's weights token by token where mixtures are drawn whole, and the beginnings of the names of other fits' mixtures,
#: of MOPO's policies and of the points of the grid.
UNIFORM = "uniform"
MPO = "mpo"
MPO_TOKENWISE = "mpo-token-level"
SOUP_UNIFORM = "soup-uniform"
SOUP_MPO = "soup-mpo"
FIT_PREFIX = "fit-"
MOPO_PREFIX = "mopo-"
GRID_PREFIX = "grid-"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One human judgement: for `prompt`, `chosen` was preferred to `rejected` (completions without the prompt).

    chosen_cut, rejected_cut: whether the reply was cut at a limit, so that it does not end where it stops
    num_tokens: of prompt, chosen and rejected, these with the end token of a reply that is not cut; 0 where nobody
        rendered them
    where: its row's place (`pairs.jsonl:3`), of two rated responses both
    """

    id: str
    prompt: Prompt
    chosen: Reply
    rejected: Reply
    weight: float = 1.0
    margin: float | None = None
    chosen_cut: bool = False
    rejected_cut: bool = False
    num_tokens: tuple[int, int, int] = field(default=(0, 0, 0), compare=False)
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Bound:
    """What an objective's average win probability must reach: E[q̄] ≥ b   (design 2.4, eq. 8)

    b is `value`, or what the reference has plus `value` where it is relative. An adaptive bound begins there, and then
    follows what training reached (eq. 13).
    """

    value: float
    relative: bool = False
    adaptive: bool = False

    @classmethod
    def parse(cls, name: str, text: str | float) -> Bound:
        """`0.55`, `reference`, `reference - 0.02`, `reference + 0.05`, `adaptive`. Raises ValueError."""
        if text == "adaptive":
            return cls(0.0, relative=True, adaptive=True)
        try:
            if isinstance(text, str) and text.strip().startswith("reference"):
                rest = text.strip().removeprefix("reference").replace(" ", "")
                found = cls(float(rest or 0.0), relative=True)
                inside = abs(found.value) < 1 and (rest == "" or rest[0] in "+-")
            else:
                found = cls(float(text))
                inside = 0.0 <= found.value <= 1.0
        except ValueError:
            inside = False
        if not inside:
            raise ValueError(
                f"bound {name}: {text!r} is no win probability. Write a number in [0, 1], such as 0.55, or "
                "`reference`, `reference + 0.05`, `reference - 0.02`."
            )
        return found

    def at(self, reference: float) -> float:
        return reference + self.value if self.relative else self.value


def chat_of(prompt: tuple[Message, ...] | ToolChat) -> tuple[tuple[Message, ...], tuple[Mapping[str, Any], ...]]:
    """A prompt's messages, and the tools that go with them."""
    return (prompt.messages, prompt.tools) if isinstance(prompt, ToolChat) else (prompt, ())


def encode_prompt(prompt: Prompt) -> tuple[str, bool]:
    """Write a prompt as the two columns (`prompt`, `is_chat`) that every table of a run uses for it."""
    if isinstance(prompt, str):
        return prompt, False
    messages, tools = chat_of(prompt)
    written = [_sorted(message) for message in messages]
    return _json({"messages": written, "tools": list(tools)} if tools else written), True


def decode_prompt(text: str, is_chat: bool) -> Prompt:
    """Read a prompt back from the columns `prompt` and `is_chat`."""
    if not is_chat:
        return text
    found = json.loads(text)
    return ToolChat(tuple(found["messages"]), tuple(found["tools"])) if isinstance(found, dict) else tuple(found)


def encode_reply(reply: Reply) -> tuple[str, bool]:
    """Write a reply as a text, and whether that is a message in JSON."""
    return (reply, False) if isinstance(reply, str) else (_json(_sorted(reply)), True)


def decode_reply(text: str, is_message: bool) -> Reply:
    """Read a reply back."""
    return dict(json.loads(text)) if is_message else text


def turns_of(prompt: Prompt) -> list[tuple[str, str]]:
    """A prompt for a reader, as (role, text) turns; a plain text is one turn without a role."""
    if isinstance(prompt, str):
        return [("", prompt)]
    messages, tools = chat_of(prompt)
    shown = [("tools", _json(list(tools)))] if tools else []
    for message in messages:
        further = {key: value for key, value in message.items() if key not in ("role", "content")}
        texts = [str(message.get("content") or ""), *([_json(further)] if further else [])]
        shown.append((str(message.get("role", "")), "\n".join(filter(None, texts))))
    return shown


def _sorted(message: Message) -> dict[str, Any]:
    """A message with its keys in order. What is below them stays as it is, since a chat template may write it out."""
    return {key: message[key] for key in sorted(message)}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def prompt_id(prompt: Prompt) -> str:
    """Name a prompt by its content: the same prompt has the same id in every objective, file and run."""
    text, is_chat = encode_prompt(prompt)
    return digest([text, is_chat])[:16]


def digest(value: object) -> str:
    """SHA-256 of a JSON value in canonical form, as hexadecimal digits."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def is_reserved(name: str) -> bool:
    """Whether a run itself gives this name to a candidate of its evaluation."""
    reserved = (REFERENCE, UNIFORM, MPO, MPO_TOKENWISE, SOUP_UNIFORM, SOUP_MPO)
    return name in reserved or name.startswith((FIT_PREFIX, MOPO_PREFIX, GRID_PREFIX))


def parse_weights(text: str, *, where: str) -> dict[str, float]:
    """Read λ as it is written in options, model ids and arguments: `helpful=0.7,harmless=0.3`.

    where: the place that the text came from, for the message. Raises ValueError for what is not a number for each name.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name in found:
            raise ValueError(f"{where} {text!r}: {name!r} has two weights.")
        try:
            found[name] = float(value)
        except ValueError:
            raise ValueError(
                f"{where} {text!r}: {part!r} is not objective=weight; write helpful=0.7,harmless=0.3."
            ) from None
    return found


def check_weights(weights: Mapping[str, float], objectives: Sequence[str], *, where: str) -> dict[str, float]:
    """Return λ in the order of `objectives`, or say what is wrong with it.

    Objectives that `weights` leaves out have weight 0. `where` names the place the weights came from, for the message.
    Raises ValueError for an unknown objective, a negative or non-finite weight, or a sum other than 1 (to 1e-6).
    """
    unknown = sorted(set(weights) - set(objectives))
    if unknown:
        raise ValueError(f"{where}: unknown objective {unknown[0]!r}; the objectives are {', '.join(objectives)}.")
    ordered = {name: float(weights.get(name, 0.0)) for name in objectives}
    for name, value in ordered.items():
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{where}: the weight of {name!r} is {value}; weights are finite and at least 0.")
    total = sum(ordered.values())
    if abs(total - 1.0) > 1e-6:
        raise ValueError(
            f"{where}: the weights {ordered} sum to {total:g}, not 1; divide each by {total:g}."
            if total > 0
            else f"{where}: all weights are 0; at least one objective needs a positive weight."
        )
    return ordered
