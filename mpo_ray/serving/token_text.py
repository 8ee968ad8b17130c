"""What single tokens look like: the text and the bytes that OpenAI's answers give of each."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mpo_ray.decoding.text_stream import CONTEXT

#: How tokenizers with a byte fallback write a single byte.
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText:
    """The text of tokens in their places, whatever the kind of tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._bytes = _byte_alphabet() if _is_byte_level(tokenizer) else None

    def of(self, token: int, before: Sequence[int]) -> tuple[str, list[int]]:
        """The text of a token after those before it, and its UTF-8 bytes.

        A part of a character is written as OpenAI does: `bytes:\\xe2\\x82`. A special token is written by its name.
        """
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return "", []
        if token in self._special:
            return name, list(name.encode())
        if self._bytes is not None and all(character in self._bytes for character in name):
            raw = bytes(self._bytes[character] for character in name)
        elif match := _BYTE.fullmatch(name):
            raw = bytes([int(match[1], 16)])
        else:
            context = [id for id in before[-CONTEXT:] if id not in self._special]
            text = self._decode([*context, token])[len(self._decode(context)) :]
            return text, list(text.encode())
        try:
            return raw.decode(), list(raw)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether its tokens are written in the alphabet that stands for bytes, one character each."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    return "ByteLevel" in {decoder.get("type"), *(one.get("type") for one in decoder.get("decoders", ()))}


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Printable bytes of Latin-1 stand for themselves; the others for the characters from U+0100 on, in order."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
