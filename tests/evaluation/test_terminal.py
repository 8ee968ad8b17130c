"""The summary at the end of a run: every number that a reader looks for, within the width of the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mpo_ray.evaluation.metrics import Metrics, number, written
from mpo_ray.evaluation.terminal import metrics_table, print_summary
from tests.evaluation.world import OBJECTIVES, evaluated, fit


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    return evaluated()


def summary(metrics: Metrics, **diagnostics: object) -> str:
    out = io.StringIO()
    print_summary(metrics, {**fit(), **diagnostics}, file=out)
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
        console.print(metrics_table(metrics, fit()))
        assert max(map(len, console.export_text().splitlines())) <= width


def test_the_weights_stand_with_their_method_interval_and_certificate(metrics):
    """The same lines that `mpo-ray fit` prints."""
    text = summary(metrics)
    assert "weights (bsmd, balanced estimator)" in text
    found = fit()
    for name, value in found["weights"].items():
        low, high = found["intervals"]["weights"][name]
        row = next(line for line in text.splitlines() if line.startswith(f" {name} ") and f"[{low:.3f}" in line)
        assert row.split()[:4] == [name, f"{value:.3f}", f"[{low:.3f},", f"{high:.3f}]"]
    assert f"gap {found['gap']:.1e}" in text


def test_the_fit_s_cautions_are_printed(metrics):
    assert "caution: The policies differ in length." in summary(metrics, warnings=["The policies differ in length."])
    assert "caution" not in summary(metrics, warnings=[])
