"""The summary at the end of a run: every number that a reader looks for, within the width of the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mpo_ray.evaluation.estimates import number, written
from mpo_ray.evaluation.metrics import Metrics
from mpo_ray.evaluation.terminal import metrics_table, print_summary
from tests.evaluation.world import OBJECTIVES, evaluated, fit


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    return evaluated()


def summary(metrics: Metrics, **diagnostics: object) -> str:
    out = io.StringIO()
    print_summary(metrics, fit()["weights"], {**fit(), **diagnostics}, file=out)
    return out.getvalue()


def line_of(text: str, label: str, occurrence: int = 0) -> str:
    return [line for line in text.splitlines() if line.strip().startswith(label)][occurrence]


def test_every_candidate_has_its_win_rates_minimum_kl_and_length_on_one_line(metrics):
    text = summary(metrics)
    for name, candidate in metrics.candidates.items():
        wins = [candidate.win_rates[o] for o in OBJECTIVES]
        expected = [number(w.value) + (f" ±{number(w.half_width)}" if name != "reference" else "") for w in wins]
        expected += [written(candidate.minimum_win_rate), number(candidate.kl.value), number(candidate.num_tokens, 1)]
        assert line_of(text, metrics.label(name)).split() == [*metrics.label(name).split(), *" ".join(expected).split()]


def test_mean_rewards_have_their_own_table(metrics):
    row = line_of(summary(metrics), "MPO mixture", occurrence=1)
    for objective in OBJECTIVES:
        reward = metrics.candidates["mpo"].rewards[objective]
        assert f"{number(reward.value)} ±{number(reward.half_width)}" in row


def test_without_a_terminal_the_lines_are_plain_and_at_most_100_columns(metrics):
    text = summary(metrics)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_on_a_terminal_the_lines_fit_its_width(metrics):
    for width in (80, 100, 140):
        console = Console(file=io.StringIO(), force_terminal=True, width=width, record=True)
        console.print(metrics_table(metrics, fit()["weights"], fit()))
        assert max(map(len, console.export_text().splitlines())) <= width


def test_the_weights_stand_with_their_method_and_the_quality_of_the_fit(metrics):
    text = summary(metrics, gap=0.00123)
    assert "positive 0.410 · concise 0.250 · detailed 0.340  (bsmd)" in text
    assert "F(λ) -0.3100 nats; gap 0.0012 nats; effective sample size: median 5.2 of 8, min 1.4" in text
    assert "caution" not in text


def test_a_fit_that_follows_single_samples_is_cautioned(metrics):
    """Design 2.2: a median effective sample size near 1 means that the largest sample decides."""
    assert "single samples decide" in summary(metrics, effective_sample_size={"min": 1.0, "median": 1.06})


def test_given_weights_need_no_diagnostics(metrics):
    out = io.StringIO()
    print_summary(metrics, {"positive": 0.5, "concise": 0.5}, {"method": "fixed"}, file=out)
    assert "positive 0.500 · concise 0.500  (fixed)" in out.getvalue()
    assert "effective sample size" not in out.getvalue()
