"""The summary at the end of a run: every number that a reader looks for, within the width of the terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from mpo_ray.evaluation.estimates import Estimate, number, written
from mpo_ray.evaluation.metrics import Metrics
from mpo_ray.evaluation.terminal import metrics_table, print_summary
from mpo_ray.evaluation.verdict import verdict
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


def test_every_candidate_has_its_win_rates_with_brackets_on_one_line(metrics):
    text = summary(metrics)
    assert "±" not in text
    for name, candidate in metrics.candidates.items():
        expected = [written(candidate.win_rates[o]) for o in OBJECTIVES]
        assert line_of(text, metrics.label(name)).split() == [*metrics.label(name).split(), *" ".join(expected).split()]


def test_the_minimum_stands_with_its_distance_to_mpo_and_what_would_decide(metrics):
    text = summary(metrics)
    for name, candidate in metrics.candidates.items():
        gap = candidate.mpo_minus_this
        expected = [written(candidate.minimum_win_rate)]
        if gap is not None:
            needed = "–" if candidate.prompts_to_decide is None else f"{candidate.prompts_to_decide:,}"
            expected += [written(gap, 3), *(["no", needed] if gap.holds_zero else ["yes"])]
        row = line_of(text, metrics.label(name), occurrence=1)
        assert row.split() == [*metrics.label(name).split(), *" ".join(expected).split()]


def test_mean_rewards_and_distance_length_and_cost_have_their_own_tables(metrics):
    text = summary(metrics)
    for name, candidate in metrics.candidates.items():
        label = metrics.label(name)
        expected = [written(candidate.rewards[o]) for o in OBJECTIVES]
        assert line_of(text, label, occurrence=2).split() == [*label.split(), *" ".join(expected).split()]
        expected = [written(candidate.kl), number(candidate.log_z.value), number(candidate.num_tokens, 1)]
        expected += [f"{number(100 * candidate.cut_share, 0)} %", str(candidate.rows_per_token)]
        assert line_of(text, label, occurrence=3).split() == [*label.split(), *" ".join(expected).split()]


def test_green_is_kept_for_what_is_decided(metrics):
    """Rows of MPO and the verdict are green where it is highest, and in no other case."""
    for gap, green in ((Estimate(0.1, 0.05, 0.15), True), (Estimate(0.02, -0.01, 0.05), False)):
        others = {n: replace(c, mpo_minus_this=gap) for n, c in metrics.candidates.items() if n != "mpo"}
        console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system="standard")
        console.print(metrics_table(replace(metrics, candidates=metrics.candidates | others), fit()))
        assert ("32m" in console.file.getvalue()) == green


def test_many_objectives_make_several_tables_and_break_no_number(metrics):
    """Seven objectives in 100 columns: three tables of win rates, each with every candidate."""
    names = [f"objective{i}" for i in range(7)]
    wide = {
        n: replace(c, win_rates=dict.fromkeys(names, c.win_rates["concise"]), rewards=dict.fromkeys(names, c.kl))
        for n, c in metrics.candidates.items()
    }
    text = summary(replace(metrics, objectives=names, candidates=wide))
    assert text.count("win rate against the reference") == 3
    assert max(map(len, text.splitlines())) <= 100
    mpo = written(metrics.candidates["mpo"].win_rates["concise"])
    assert sum(line.count(mpo) for line in text.splitlines() if line.strip().startswith("MPO mixture")) >= 7


def test_the_verdict_and_the_volumes_of_both_families_are_told(full):
    text = " ".join(summary(full).split())
    assert verdict(full).sentence in text
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
    assert line_of(text, "soup at MPO's λ").count("[") == 3
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
