"""Peak memory of a command and all it starts: python benchmarks/peak_memory.py mpo-ray run configs/quickstart.yaml

Prints two sums over all processes, looked at every second: proportional set sizes, in which a page that n processes
share counts 1/n for each, and resident set sizes, in which it counts whole for each.
"""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

GIB = 2**30


def memory_of(root: psutil.Process) -> tuple[int, int]:
    """(Σ PSS, Σ RSS) of a process and its descendants, bytes; a process that ends meanwhile counts 0."""
    proportional = resident = 0
    for process in (root, *root.children(recursive=True)):
        try:
            memory = process.memory_full_info()
        except psutil.Error:
            continue
        proportional, resident = proportional + memory.pss, resident + memory.rss
    return proportional, resident


def main(command: list[str]) -> int:
    started = time.monotonic()
    child = subprocess.Popen(command)
    root = psutil.Process(child.pid)
    peaks = (0, 0)
    while child.poll() is None:
        peaks = tuple(map(max, peaks, memory_of(root)))
        time.sleep(1.0)
    seconds = time.monotonic() - started
    print(f"peak memory: {peaks[0] / GIB:.2f} GiB proportional, {peaks[1] / GIB:.2f} GiB resident; {seconds:.0f} s")
    return child.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
