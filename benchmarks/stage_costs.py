"""What every stage of a run costs: python benchmarks/stage_costs.py configs/imdb.yaml [--set KEY.PATH=VALUE …]

Does `mpo-ray run CONFIG`, looks twice a second at the processor time (user and system) of all its processes, and leaves
`costs.json` in the run directory: processor-seconds and wall time by stage. The time between the ends of two stages
belongs to the later one, so the first carries the start of Ray. A process that ends loses what it used since the last
look.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import psutil

from mpo_ray.run import Run
from mpo_ray.run_file import load_config

COSTS = "costs.json"
INTERVAL_S = 0.5


class ProcessTree:
    """The processor time of a process and of everything it started, ended ones included, seconds."""

    def __init__(self, root: psutil.Process) -> None:
        self._root = root
        self._used: dict[psutil.Process, float] = {}  # by process id and start time

    def processor_seconds(self) -> float:
        try:
            processes = [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            processes = []
        for process in {*processes, *self._used}:  # one whose parent has ended is nobody's descendant any more
            try:
                if process.is_running():  # false where its number belongs to another process by now
                    times = process.cpu_times()
                    self._used[process] = times.user + times.system
            except psutil.Error:
                continue
        return sum(self._used.values())


class StageLedger:
    """Shares the processor time between the stages of a manifest, as they finish."""

    def __init__(self, records: Mapping[str, Any]) -> None:
        """records: the stages in the manifest before anything is done."""
        self._records = dict(records)
        self._booked = 0.0
        self.costs: dict[str, dict[str, float]] = {}

    def look(self, records: Mapping[str, Any], processor_seconds: float) -> None:
        """Book what was used since the last stage ended on the stages that have ended by now, by their wall times."""
        ended = {name: record for name, record in records.items() if self._records.get(name) != record}
        if not ended:
            return
        spent, self._booked = processor_seconds - self._booked, processor_seconds
        total = sum(record["seconds"] for record in ended.values())
        for name, record in ended.items():
            share = record["seconds"] / total if total > 0 else 1 / len(ended)
            self.costs[name] = {"processor_seconds": round(spent * share, 2), "seconds": record["seconds"]}
        self._records.update(ended)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="run file (YAML)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", dest="overrides")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    run = Run(config.storage, config.name)
    ledger = StageLedger(run.manifest()["stages"])
    overrides = [word for item in options.overrides for word in ("--set", item)]
    child = subprocess.Popen([sys.executable, "-m", "mpo_ray", "run", options.config, *overrides])
    tree = ProcessTree(psutil.Process(child.pid))
    used = 0.0
    while child.poll() is None:
        used = tree.processor_seconds()
        ledger.look(run.manifest()["stages"], used)
        time.sleep(INTERVAL_S)
    ledger.look(run.manifest()["stages"], used)
    costs = (run.read_json(COSTS) or {}) | ledger.costs
    run.write_json(COSTS, costs)
    for name, cost in ledger.costs.items():
        print(f"{name:12} {cost['processor_seconds']:9.1f} processor-seconds {cost['seconds']:9.1f} s")
    print(json.dumps({"costs": f"{run.root}/{COSTS}", "processor_seconds": round(used, 1)}))
    return child.returncode


if __name__ == "__main__":
    sys.exit(main())
