"""Text that is streamed while its tokens come: whole characters, and the end at a stop string."""

from __future__ import annotations

import pytest

from mpo_ray.decoding.text_stream import TextStream


class Bytes:
    """A tokenizer of bytes: one id per byte of UTF-8."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain words", "naïve café ☕ 你好 👩‍🚀!", "", "ends in half: ☕"])
def test_the_pieces_of_a_text_stream_are_the_text(text: str) -> None:
    """No piece holds half a character, and together they are the text; cut in mid-character it ends in U+FFFD."""
    stream = TextStream(Bytes())
    pieces = [stream.push(byte) for byte in text.encode()]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text
    half = TextStream(Bytes())
    assert "".join(half.push(byte) for byte in "☕".encode()[:2]) + half.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("stop", "expected", "stopped"),
    [
        (["stop"], "one two ", True),
        (["two", "one"], "", True),
        (["xyz"], "one two stop st", False),
        (["st."], "one two stop st", False),
    ],
)
def test_text_ends_before_the_first_stop_string(stop: list[str], expected: str, stopped: bool) -> None:
    """Also where it comes in pieces, and what only began like one is given back at the end."""
    stream = TextStream(Bytes(), stop)
    text = ""
    for byte in b"one two stop st":
        text += stream.push(byte)
        if stream.stopped:
            break
    assert text + stream.finish() == expected
    assert stream.stopped is stopped
