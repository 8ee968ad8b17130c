"""The quickstart as a user runs it, whole: the claim that it makes on the terminal."""

import sys
from pathlib import Path

import pytest

from mpo_ray.evaluation.metrics import Metrics
from mpo_ray.evaluation.verdict import verdict
from mpo_ray.records import MPO
from tests import tiny_run


@pytest.mark.slow
@pytest.mark.usefixtures("cheap_workers")
def test_mpos_worst_objective_is_above_every_single_policys_outside_the_intervals(tmp_path: Path) -> None:
    """min_k win rate of the mixture: the lower end of its interval lies above the upper end of every policy's."""
    given = ["run", str(tiny_run.CONFIG), "--json", "--set", f"storage={tmp_path}"]
    arguments = [sys.executable, "-m", "tests.command", *given]
    metrics = Metrics.from_json(tiny_run.run(arguments)["metrics"])
    mixture = metrics.candidates[MPO].minimum_win_rate
    for objective in metrics.objectives:
        policy = metrics.candidates[objective]
        assert policy.win_rates[objective].low > 0.6  # it learned what it was taught
        assert mixture.low > policy.minimum_win_rate.high
        assert policy.mpo_minus_this.low > 0.0
    assert verdict(metrics).kind in ("highest", "undecided")
