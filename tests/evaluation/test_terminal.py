"""The summary at the end of a run: every number that a reader looks for, within the width of the terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from mpo_ray.evaluation.estimates import Estimate, number, written
from mpo_ray.evaluation.metrics import Metrics
from mpo_ray.evaluation.terminal import metrics_table, print_summary
from mpo_ray.evaluation.verdict import baseline_verdict, verdict
from tests.evaluation.world import OBJECTIVES, evaluated, fit, with_front


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    return evaluated()


@pytest.fixture(scope="module")
def full() -> Metrics:
    return with_front()


def summary(metrics: Metrics, **diagnostics: object) -> str:
    out = io.StringIO()
    print_summary(metrics, {**fit(), **diagnostics}, file=out)
    return out.getvalue()


def line_of(text: str, label: str, occurrence: int = 0) -> str:
    return [line for line in text.splitlines() if line.strip().startswith(label)][occurrence]


def plus_minus(estimate: Estimate) -> str:
    return f"{number(estimate.value)} ±{number(estimate.half_width)}"


def test_every_candidate_has_its_win_rates_minimum_and_distance_to_mpo_on_one_line(metrics):
    text = summary(metrics)
    for name, candidate in metrics.candidates.items():
        wins = [candidate.win_rates[o] for o in OBJECTIVES]
        expected = [number(w.value) if name == "reference" else plus_minus(w) for w in wins]
        expected += [written(candidate.minimum_win_rate)]
        expected += [] if name == "mpo" else [plus_minus(candidate.mpo_minus_this)]
        assert line_of(text, metrics.label(name)).split() == [*metrics.label(name).split(), *" ".join(expected).split()]


def test_mean_rewards_kl_log_z_and_length_have_their_own_table(metrics):
    text = summary(metrics)
    for name, candidate in metrics.candidates.items():
        expected = [plus_minus(candidate.rewards[o]) for o in OBJECTIVES]
        expected += [number(candidate.kl.value), number(candidate.log_z.value), number(candidate.num_tokens, 1)]
        row = line_of(text, metrics.label(name), occurrence=1)
        assert row.split() == [*metrics.label(name).split(), *" ".join(expected).split()]


def test_both_verdicts_and_the_volumes_of_both_families_are_told(full):
    text = " ".join(summary(full).split())
    assert verdict(full).sentence in text
    assert baseline_verdict(full).sentence in text
    volume = full.pareto.hypervolume
    assert f"15 points each: mixtures {written(volume.mixture, 3)}, soups {written(volume.soup, 3)}" in text
    assert "MOPO" not in text
    given = replace(volume, mopo=volume.soup, num_mopo=7)
    text = summary(replace(full, pareto=replace(full.pareto, hypervolume=given)))
    told = f"; MOPO's 7 policies {written(volume.soup, 3)} ({full.pareto.num_prompts} prompts)."
    assert told in " ".join(text.split())


def test_the_note_says_how_mixtures_were_decoded(metrics):
    assert "Mixtures are decoded token by token; log Z is what that drops" in " ".join(summary(metrics).split())
    text = " ".join(summary(replace(metrics, particles=8)).split())
    assert "Mixtures are drawn whole, with 8 particles" in text
    assert "decoded token by token" not in text


def test_without_a_terminal_the_lines_are_plain_and_at_most_100_columns(full):
    """Three objectives and every kind of candidate; no number is broken over two lines."""
    text = summary(full)
    assert line_of(text, "soup at MPO's λ").count("±") == 4
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
