"""What a body must be before anybody parses it: JSON, all there in time, whole characters, bounded size and depth."""

from __future__ import annotations

import asyncio
import re
import zlib

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from mpo_ray.serving.errors import ApiError

#: Strings, whole or up to the end of the body, and the brackets outside them. Nothing is ever matched twice.
_STRINGS_AND_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[{]|[\]}]', re.DOTALL)
#: JSON up to its first escape of half a character: a surrogate that has no other half.
_WHOLE_CHARACTERS = re.compile(
    rb"(?:[^\\]++|\\[^u]|\\u(?![dD][89a-fA-F])|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*+",
    re.DOTALL,
)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
#: Seconds that a body may take, and bytes for each of which a second is added, so that slow lines have theirs.
BODY_SECONDS = 30.0
BYTES_PER_SECOND = 16 * 2**10
#: `zlib`'s name for: gzip, with its header.
_GZIP = 31


def check_content_type(headers: Headers) -> None:
    """Raises ApiError 415."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(
            415, f"the content type is {kind[:100] or 'missing'}; send JSON as application/json.", code="not_json"
        )


async def read_body(headers: Headers, receive: Receive, *, max_bytes: int) -> bytes | None:
    """The whole body, unpacked where it is gzip; None where the client left.

    Raises ApiError 413, before more than `max_bytes` are held, 415 for other encodings, 408 for a body that stalls.
    """
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip", ""):
        raise ApiError(
            415,
            f"the content encoding is {encoding[:100]}; send the body as it is or as gzip.",
            code="unsupported_encoding",
        )
    length = headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)
    body = await _received(receive, max_bytes)
    return unzipped(body, max_bytes=max_bytes) if body is not None and "gzip" in encoding else body


async def _received(receive: Receive, max_bytes: int) -> bytes | None:
    loop = asyncio.get_running_loop()
    began, parts, size = loop.time(), [], 0
    while True:
        try:
            async with asyncio.timeout_at(began + BODY_SECONDS + size / BYTES_PER_SECOND):
                message: Message = await receive()
        except TimeoutError:
            raise ApiError(408, "the body did not come in time; send it again.", code="body_timeout") from None
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return b"".join(parts)


def unzipped(body: bytes, *, max_bytes: int) -> bytes:
    """What gzip packed, of one member or several. Raises ApiError 413, before more is unpacked, and 400."""
    parts, room = [], max_bytes
    while True:
        member = zlib.decompressobj(_GZIP)
        try:
            part = member.decompress(body, room + 1)
        except zlib.error:
            raise ApiError(400, "the body is not gzip, as its content encoding says.") from None
        if len(part) > room:
            raise _too_large(max_bytes)
        if not member.eof:
            raise ApiError(400, "the gzip of the body ends too early.")
        parts.append(part)
        room -= len(part)
        body = member.unused_data
        if not body:
            return b"".join(parts)


def check_text(body: bytes) -> None:
    """Raises ApiError 400 for what is not UTF-8, and for escapes of JSON that no UTF-8 could write."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start}.") from None
    whole = _WHOLE_CHARACTERS.match(body)
    assert whole is not None
    if _SURROGATE.match(body, whole.end()):
        raise ApiError(400, f"the body has half of a surrogate pair at byte {whole.end()}, which is no character.")


def check_depth(body: bytes, *, max_depth: int) -> None:
    """Raises ApiError 400 for JSON nested deeper than `max_depth`."""
    if body.count(b"[") + body.count(b"{") <= max_depth:
        return
    depth = 0
    for match in _STRINGS_AND_BRACKETS.finditer(body):
        if match[0] in (b"[", b"{"):
            depth += 1
            if depth > max_depth:
                raise ApiError(400, f"the body is nested more than {max_depth} deep.", code="too_deep")
        elif match[0] in (b"]", b"}"):
            depth -= 1


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is larger than {max_bytes} bytes.", code="body_too_large")
