"""How fast a training goes, from the times of its steps."""

from __future__ import annotations

import pytest

from mpo_ray.training.pace import SECONDS_LEFT, TOKENS_PER_S, Pace


def test_the_first_step_counts_until_there_is_a_second() -> None:
    """A first step of 10 s and others of 2 s: after it 10 s a step are all that is known, then 2 s."""
    pace = Pace(start=0, total=6, tokens_per_step=100.0, now=50.0)
    assert pace.after(1, 60.0) == {TOKENS_PER_S: pytest.approx(10.0), SECONDS_LEFT: pytest.approx(50.0)}
    for step in range(2, 7):
        found = pace.after(step, 60.0 + 2 * (step - 1))
        assert found == {TOKENS_PER_S: pytest.approx(50.0), SECONDS_LEFT: pytest.approx(2.0 * (6 - step))}


def test_steps_of_an_earlier_run_count_for_nothing() -> None:
    pace = Pace(start=90, total=100, tokens_per_step=8.0, now=0.0)
    assert pace.after(91, 4.0) == {TOKENS_PER_S: pytest.approx(2.0), SECONDS_LEFT: pytest.approx(36.0)}
    assert pace.after(94, 10.0) == {TOKENS_PER_S: pytest.approx(4.0), SECONDS_LEFT: pytest.approx(12.0)}
