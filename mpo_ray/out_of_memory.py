"""Errors of memory that could not be had: how much it was, and in whose words they end.

Libraries raise them as errors of many classes, which only their texts tell apart. Nothing is imported for that.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from mpo_ray.run import StageError

#: What a text says of memory on a GPU. The groups: what was asked for; of how much, and what of it was free.
GPU = re.compile(
    r"out of memory\. Tried to allocate (?P<asked>[\d.]+ \w+)"
    r"(?:.*?total capacity of (?P<total>[\d.]+ \w+) of which (?P<free>[\d.]+ \w+) is free)?",
    re.DOTALL,
)
GPU_ALONE = re.compile(r"CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED")
#: What a text says of the machine's memory: bytes, or a number with its unit.
BYTES = re.compile(r"DefaultCPUAllocator: .{0,40}?you tried to allocate (\d+) bytes|unable to mmap (\d+) bytes")
WRITTEN = re.compile(r"Unable to allocate ([\d.]+ \w+) for an array")
MACHINE_ALONE = re.compile(r"Cannot allocate memory|std::bad_alloc")


class OutOfMemoryError(StageError):
    """Memory could not be had. The message says for what, how much, and which setting lowers it."""


def lacking(error: BaseException) -> str | None:
    """What could not be had, `1.50 GiB of memory` for example; None for an error of another kind.

    An error that others were raised from counts as its cause.
    """
    seen: BaseException | None = error
    while seen is not None:
        if (found := lacking_in(str(seen))) is not None:
            return found
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno == errno.ENOMEM):
            return "memory"
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


def lacking_in(text: str) -> str | None:
    """What could not be had, by the text of an error or a traceback; None for one of another kind."""
    if gpu := GPU.search(text):
        of = f" ({gpu['free']} of {gpu['total']} were free)" if gpu["total"] else ""
        return f"{gpu['asked']} of GPU memory{of}"
    if GPU_ALONE.search(text):
        return "GPU memory"
    if machine := BYTES.search(text):
        return f"{_size(int(machine[1] or machine[2]))} of memory"
    if written := WRITTEN.search(text):
        return f"{written[1]} of memory"
    return "memory" if MACHINE_ALONE.search(text) else None


@contextmanager
def memory_told(what: str, remedy: str) -> Iterator[None]:
    """Turn a lack of memory in the block into an OutOfMemoryError of one sentence, and another that says what to do."""
    try:
        yield
    except Exception as error:
        lack = lacking(error)
        if lack is None or isinstance(error, OutOfMemoryError):
            raise
        raise OutOfMemoryError(f"{what}: out of memory: {lack} could not be had. {remedy}") from error


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
