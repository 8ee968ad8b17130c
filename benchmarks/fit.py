"""Reading a score table from Parquet and fitting it: time and peak memory against the number of prompts.

Writes a table of random log-ratios for each size to a temporary directory, handles it in a process of its own, and
deletes it. Prints, per size, seconds, rows per second, and the peaks of that process: resident memory, in which the
pages of the file that holds the values count too, and anonymous memory, which the kernel cannot take back. Then the
slope of log(seconds) over log(prompts): 1 is linear.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from mpo_ray.data.scores import open_scores
from mpo_ray.maths.sample_table import SampleTable

GIB = 2**30
#: Standard deviations of the log-ratios, nats: between a policy close to the reference and one far away.
SPREAD = (1.0, 4.0)
PROMPTS_TOGETHER = 10_000
#: Peaks are for memory of the size of the tables; below this many seconds, start-up decides the time.
SHORTEST = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="sizes to measure")
    parser.add_argument("--samples", type=int, default=16, help="responses of each prompt")
    parser.add_argument("--objectives", type=int, default=8)
    parser.add_argument("--proposals", choices=("reference", "policies"), default="reference", help="who drew the rows")
    parser.add_argument("--shuffled", action="store_true", help="rows in random order instead of prompt by prompt")
    options = parser.parse_args()

    print("  prompts        rows GiB on disk     step       s   CPU s      rows/s  peak RSS anonymous")
    seconds: dict[str, list[float]] = {}
    for prompts in options.prompts:
        with tempfile.TemporaryDirectory(prefix="fit-benchmark-") as directory:
            path = Path(directory) / "scores.parquet"
            write_table(path, prompts, options)
            size, rows = path.stat().st_size / GIB, prompts * options.samples
            for step, took, resident, anonymous in in_own_process(path):
                seconds.setdefault(step, []).append(took)
                print(
                    f"{prompts:9,} {rows:11,} {size:11.2f} {step:>8} {took:7.2f} {rows / took:11,.0f} "
                    f"{resident / GIB:5.2f} GiB {anonymous / GIB:5.2f} GiB",
                    flush=True,
                )
    if len(options.prompts) > 1:
        for step, times in seconds.items():
            slope = np.polyfit(np.log(options.prompts), np.log(times), 1)[0]
            last = np.log(times[-1] / times[-2]) / np.log(options.prompts[-1] / options.prompts[-2])
            print(f"{step}: log-log slope of time over prompts {slope:.2f}; between the last two sizes {last:.2f}")


def write_table(path: Path, num_prompts: int, options: argparse.Namespace) -> None:
    """Random log-ratios ℓ ∼ N(−σ²/2, σ²), so that E exp ℓ = 1 as for samples of π_ref, one row group at a time."""
    rng = np.random.default_rng(0)
    names = [f"o{number}" for number in range(options.objectives)]
    spreads = np.linspace(*SPREAD, options.objectives)
    order = rng.permutation(num_prompts * options.samples) if options.shuffled else None
    writer = None
    for first in range(0, num_prompts, PROMPTS_TOGETHER):
        last = min(first + PROMPTS_TOGETHER, num_prompts)
        rows = np.arange(first * options.samples, last * options.samples)
        rows = rows if order is None else order[rows]
        prompts, samples = np.divmod(rows, options.samples)
        ratios = rng.normal(-(spreads**2) / 2, spreads, (len(rows), options.objectives))
        columns = {
            "prompt_id": pa.compute.cast(pa.array(prompts), pa.string()),
            "sample_id": pa.array(samples.astype(np.int32)),
            "log_ref": pa.array(rng.normal(-100, 20, len(rows))),
        }
        if options.proposals == "policies":
            drawn_by = pa.DictionaryArray.from_arrays(pa.array(samples % len(names)), pa.array(names))
            columns["proposal"] = drawn_by.dictionary_decode()
        columns |= {f"log_ratio_{name}": pa.array(ratios[:, k]) for k, name in enumerate(names)}
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


# ---- what is measured: each step in one new process ------------------------------------------------------------------


def read(path: Path, proposals: str = "balanced") -> SampleTable:
    """From Parquet to the numeric table that the fit takes."""
    return open_scores(str(path)).samples("balanced")


#: Steps after reading, by name, each given the table. The solver's steps (exact, with intervals) belong here.
STEPS: dict[str, Callable[[SampleTable], object]] = {}


def measure(path: Path, queue: multiprocessing.Queue[tuple[str, float, int, int]]) -> None:
    with peak_memory() as peak:
        start = time.perf_counter()
        table = read(path)
        queue.put(("read", time.perf_counter() - start, *peak()))
    for name, step in STEPS.items():
        with peak_memory() as peak:
            start = time.perf_counter()
            step(table)
            queue.put((name, time.perf_counter() - start, *peak()))


def in_own_process(path: Path) -> Iterator[tuple[str, float, int, int]]:
    """Yield (step, seconds, peak resident bytes, peak anonymous bytes) as the steps end."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(path, queue))
    process.start()
    for _ in range(1 + len(STEPS)):
        while queue.empty():
            if not process.is_alive() and queue.empty():
                raise SystemExit(f"the process that measures ended with exit code {process.exitcode}")
            time.sleep(0.05)
        yield queue.get()
    process.join()


@contextmanager
def peak_memory() -> Iterator[Callable[[], tuple[int, int]]]:
    """Give a function that returns the peaks so far: (resident, resident − mapped files) bytes, looked at at 20 Hz."""
    process, done, peaks = psutil.Process(), Event(), [0, 0]

    def look() -> None:
        memory = process.memory_info()
        peaks[:] = max(peaks[0], memory.rss), max(peaks[1], memory.rss - memory.shared)

    def watch() -> None:
        while not done.wait(0.05):
            look()

    def so_far() -> tuple[int, int]:
        look()
        return peaks[0], peaks[1]

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield so_far
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
