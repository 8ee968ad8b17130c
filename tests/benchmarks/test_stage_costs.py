"""Processor time is counted over a whole tree of processes, and each second of it belongs to one stage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from stage_costs import ProcessTree, StageLedger

BURN = "import time\nwhile time.process_time() < 0.5: pass\n"
#: Burns half a second in a child, says so, and ends the child at the first line of input, itself at the second.
PARENT = f"""
import subprocess, sys
burning = {BURN + "print(flush=True); input()"!r}
child = subprocess.Popen([sys.executable, "-c", burning], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline(); print(flush=True); input(); child.communicate(b"\\n"); print(flush=True); input()
"""


def test_the_time_of_a_child_counts_while_it_runs_and_after_it_has_ended() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        tree = ProcessTree(psutil.Process(parent.pid))
        parent.stdout.readline()
        running = tree.processor_seconds()
        parent.stdin.write("\n")
        parent.stdin.flush()
        parent.stdout.readline()
        assert len(psutil.Process(parent.pid).children()) == 0
        ended = tree.processor_seconds()
        parent.stdin.write("\n")
    assert running >= 0.45
    assert ended >= running
    assert tree.processor_seconds() == ended


def test_every_second_is_booked_once_on_the_stage_that_ended_after_it() -> None:
    ledger = StageLedger({"data": {"seconds": 9.0, "finished": "before"}})
    data = {"seconds": 2.0, "finished": "now"}
    pairs = {"seconds": 5.0, "finished": "now"}
    fit, mixture = {"seconds": 3.0, "finished": "now"}, {"seconds": 1.0, "finished": "now"}
    ledger.look({}, 1.0)
    ledger.look({"data": data}, 4.0)
    ledger.look({"data": data}, 6.0)
    ledger.look({"data": data, "pairs": pairs}, 9.0)
    ledger.look({"data": data, "pairs": pairs, "fit": fit, "mixture": mixture}, 17.0)
    spent = {name: cost["processor_seconds"] for name, cost in ledger.costs.items()}
    assert spent == {"data": 4.0, "pairs": 5.0, "fit": 6.0, "mixture": 2.0}
    assert sum(spent.values()) == pytest.approx(17.0)


def test_a_stage_that_was_complete_before_costs_nothing() -> None:
    record = {"seconds": 9.0, "finished": "before"}
    ledger = StageLedger({"data": record})
    ledger.look({"data": record}, 5.0)
    assert ledger.costs == {}
