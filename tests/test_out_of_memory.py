"""What errors of lacking memory say, as the libraries raise them at a real limit, and as a GPU's allocator writes."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from mpo_ray.out_of_memory import OutOfMemoryError, lacking, lacking_in, memory_told

GPU = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which 12.06 MiB is "
    "free. Including non-PyTorch memory, this process has 139.78 GiB memory in use."
)
#: Meets a limit on the memory of its own process, in the ways that are used here.
LIMITED = """
import resource
import numpy, torch
from pathlib import Path
from mpo_ray.out_of_memory import lacking

taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, taken + 2**28))
for make in (lambda: torch.ones(2**28), lambda: numpy.ones(2**27), lambda: bytearray(2**30)):
    try:
        make()
    except Exception as error:
        print(lacking(error))
"""


def test_what_libraries_raise_at_a_limit_is_known() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["1.00 GiB of memory", "1.00 GiB of memory", "memory"], done.stderr


def test_a_gpu_says_how_much_there_was() -> None:
    assert lacking_in(GPU) == "20.00 MiB of GPU memory (12.06 MiB of 139.80 GiB were free)"
    assert lacking_in("CUDA error: out of memory") == "GPU memory"


def test_an_error_that_was_made_of_another_counts_as_it() -> None:
    error = ValueError("the model cannot be opened")
    error.__cause__ = RuntimeError(GPU)
    assert lacking(error) == lacking_in(GPU)
    assert lacking(ValueError("the memory of this film is not enough")) is None


def test_a_lack_of_memory_ends_in_one_sentence_that_travels() -> None:
    with pytest.raises(OutOfMemoryError) as raised, memory_told("scores", "Lower scoring.batch_size (now 32)."):
        raise RuntimeError(GPU)
    sentence = (
        "scores: out of memory: 20.00 MiB of GPU memory (12.06 MiB of 139.80 GiB were free) could not be had. Lower "
        "scoring.batch_size (now 32)."
    )
    assert str(raised.value) == str(pickle.loads(pickle.dumps(raised.value))) == sentence
    with pytest.raises(KeyError), memory_told("scores", ""):
        raise KeyError("x")
