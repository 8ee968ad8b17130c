"""Reading a score table from Parquet and fitting it: time and peak memory against the number of prompts.

`exact` is the fit alone, `interval` the fit with intervals of 200 bootstrap draws.

Writes a table of random log-ratios for each size to a temporary directory, handles it in a process of its own, and
deletes it. Prints, per size and step, seconds on the clock and of the processor, rows per second, and the peaks of that
process: resident memory, which includes the pages of the file that holds the values, and what of it is not such pages,
which the kernel cannot take back. Then the slope of log(seconds) over log(prompts): 1 is linear.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mpo_ray.data.scores import open_scores
from mpo_ray.maths.exact_fit import solve
from mpo_ray.maths.fit_uncertainty import bootstrap_fit
from mpo_ray.maths.sample_table import SampleTable
from mpo_ray.maths.simplex import uniform

GIB = 2**30
#: Standard deviations of the log-ratios, nats, of the first and the last objective.
SPREADS = (1.0, 4.0)
PROMPTS_TOGETHER = 10_000

DRAWS = 200

#: What is measured after reading, by name: each step takes the table.
STEPS: dict[str, Callable[[SampleTable], object]] = {
    "exact": solve,
    "interval": lambda table: bootstrap_fit(
        table, uniform(table.num_objectives), draws=DRAWS, confidence=0.95, rng=np.random.default_rng(0)
    ),
}


@dataclass(frozen=True)
class Measured:
    """One step: seconds on the clock and of the processor, peak bytes resident and of these not of mapped files."""

    step: str
    seconds: float
    processor: float
    resident: int
    anonymous: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="sizes to measure")
    parser.add_argument("--samples", type=int, default=16, help="responses of each prompt")
    parser.add_argument("--objectives", type=int, default=8)
    parser.add_argument("--proposals", choices=("reference", "policies"), default="reference", help="who drew the rows")
    parser.add_argument("--shuffled", action="store_true", help="rows in random order instead of prompt by prompt")
    options = parser.parse_args()

    print("  prompts        rows   on disk     step       s   CPU s      rows/s   peak RSS  anonymous")
    seconds: dict[str, list[float]] = {}
    for prompts in options.prompts:
        with tempfile.TemporaryDirectory(prefix="fit-benchmark-") as directory:
            path = Path(directory) / "scores.parquet"
            write_table(path, prompts, options)
            size, rows = path.stat().st_size / GIB, prompts * options.samples
            for done in in_own_process(path):
                seconds.setdefault(done.step, []).append(done.seconds)
                print(
                    f"{prompts:9,} {rows:11,} {size:5.2f} GiB {done.step:>8} {done.seconds:7.2f} {done.processor:7.2f} "
                    f"{rows / done.seconds:11,.0f} {done.resident / GIB:6.2f} GiB {done.anonymous / GIB:6.2f} GiB",
                    flush=True,
                )
    if len(options.prompts) > 1:
        for step, times in seconds.items():
            slopes = np.diff(np.log(times)) / np.diff(np.log(options.prompts))
            print(f"{step}: log-log slope of time over prompts {', '.join(f'{slope:.2f}' for slope in slopes)}")


def write_table(path: Path, num_prompts: int, options: argparse.Namespace) -> None:
    """Random log-ratios ℓ ∼ N(−σ²/2, σ²), so that E exp ℓ = 1 as for samples of π_ref, one row group at a time."""
    rng = np.random.default_rng(0)
    names = [f"o{number}" for number in range(options.objectives)]
    spreads = np.linspace(*SPREADS, options.objectives)
    order = rng.permutation(num_prompts * options.samples) if options.shuffled else None
    writer = None
    for first in range(0, num_prompts, PROMPTS_TOGETHER):
        last = min(first + PROMPTS_TOGETHER, num_prompts)
        rows = np.arange(first * options.samples, last * options.samples)
        prompts, samples = np.divmod(rows if order is None else order[rows], options.samples)
        ratios = rng.normal(-(spreads**2) / 2, spreads, (len(rows), options.objectives))
        columns = {
            "prompt_id": pc.cast(pa.array(prompts), pa.string()),
            "sample_id": pa.array(samples.astype(np.int32)),
            "log_ref": pa.array(rng.normal(-100, 20, len(rows))),
        }
        if options.proposals == "policies":
            columns["proposal"] = pa.array(names).take(pa.array(samples % len(names)))
        columns |= {f"log_ratio_{name}": pa.array(ratios[:, k]) for k, name in enumerate(names)}
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def measure(path: Path, queue: Any) -> None:
    """Read the table, then take every step on it; what each took goes into the queue."""
    table = _measured("read", lambda: open_scores(str(path)).samples("balanced"), queue)
    for name, step in STEPS.items():
        _measured(name, lambda step=step: step(table), queue)


def _measured(name: str, work: Callable[[], Any], queue: Any) -> Any:
    process, done, peaks = psutil.Process(), Event(), [0, 0]

    def watch() -> None:
        while True:
            memory = process.memory_info()
            peaks[:] = max(peaks[0], memory.rss), max(peaks[1], memory.rss - memory.shared)
            if done.wait(0.05):
                return

    watcher = Thread(target=watch)
    watcher.start()
    start, processor = time.perf_counter(), time.process_time()
    try:
        result = work()
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
    finally:
        done.set()
        watcher.join()
    queue.put(Measured(name, seconds, processor, *peaks))
    return result


def in_own_process(path: Path) -> Iterator[Measured]:
    """Yield the steps as they end."""
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


if __name__ == "__main__":
    main()
