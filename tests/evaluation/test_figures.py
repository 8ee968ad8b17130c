"""The pictures hold the data: what is read back from their artists is what went in."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from mpo_ray.drawing import DPI, png
from mpo_ray.evaluation import figures
from mpo_ray.evaluation.candidates import Candidate
from mpo_ray.evaluation.metrics import Metrics
from mpo_ray.evaluation.pareto import compare_points
from mpo_ray.evaluation.verdict import SHORT, verdict
from tests.evaluation.world import (
    OBJECTIVES,
    WORLD,
    Tendency,
    completions,
    evaluate_completions,
    evaluated,
    records,
    with_front,
)


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    return evaluated()


@pytest.fixture(scope="module")
def full() -> Metrics:
    """Every kind of candidate, with a grid of mixtures and soups."""
    return with_front()


def legend_of(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def colours_of(figure) -> dict[str, str]:
    """Legend label → colour."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    colours = [h.patches[0].get_facecolor() if hasattr(h, "patches") else h.lines[0].get_color() for h in handles]
    return {label: to_hex(colour).upper() for label, colour in zip(labels, colours, strict=True)}


def points_of(axes) -> dict[str, tuple[float, float, np.ndarray, np.ndarray]]:
    """Label → x, y, and the ends of the horizontal and of the vertical error bar."""
    points = {}
    for container in axes.containers:
        line, _, (horizontal, vertical) = container.lines
        bars = horizontal.get_segments()[0][:, 0], vertical.get_segments()[0][:, 1]
        points[container.get_label()] = (line.get_xdata()[0], line.get_ydata()[0], *bars)
    return points


def test_win_rate_bars_have_the_heights_and_intervals_of_the_metrics(metrics):
    figure = figures.win_rate_figure(metrics)
    axes = figure.axes[0]
    bars = [c for c in axes.containers if hasattr(c, "patches")]
    names = [name for name in metrics.candidates if name != "reference"]
    assert [bar.get_label() for bar in bars] == [metrics.label(name) for name in names] == legend_of(figure)
    for name, bar in zip(names, bars, strict=True):
        candidate = metrics.candidates[name]
        estimates = [*(candidate.win_rates[o] for o in OBJECTIVES), candidate.minimum_win_rate]
        np.testing.assert_allclose([patch.get_height() for patch in bar.patches], [e.value for e in estimates])
        ends = [segment[:, 1] for segment in bar.errorbar.lines[2][0].get_segments()]
        np.testing.assert_allclose(ends, [[e.low, e.high] for e in estimates])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        *OBJECTIVES,
        f"minimum\n({SHORT[verdict(metrics).kind]})",
    ]


def test_bars_stand_in_the_group_of_their_objective(metrics):
    axes = figures.win_rate_figure(metrics).axes[0]
    for bar in (c for c in axes.containers if hasattr(c, "patches")):
        centres = [patch.get_x() + patch.get_width() / 2 for patch in bar.patches]
        np.testing.assert_array_equal(np.round(centres), np.arange(4))


def test_parity_is_drawn_at_a_half(metrics):
    for axes in (figures.win_rate_figure(metrics).axes[0], figures.kl_figure(metrics).axes[0]):
        assert [0.5, 0.5] in [list(line.get_ydata()) for line in axes.lines]


def test_each_trade_off_panel_has_every_candidate_at_its_rewards(metrics):
    figure = figures.trade_off_figure(metrics)
    for axes, (first, second) in zip(figure.axes, combinations(OBJECTIVES, 2), strict=True):
        assert (axes.get_xlabel(), axes.get_ylabel()) == (f"mean reward: {first}", f"mean reward: {second}")
        points = points_of(axes)
        assert list(points) == [metrics.label(name) for name in metrics.candidates]
        for name, candidate in metrics.candidates.items():
            x, y, horizontal, vertical = points[metrics.label(name)]
            assert (x, y) == (candidate.rewards[first].value, candidate.rewards[second].value)
            np.testing.assert_allclose(horizontal, [candidate.rewards[first].low, candidate.rewards[first].high])
            np.testing.assert_allclose(vertical, [candidate.rewards[second].low, candidate.rewards[second].high])


def test_many_objectives_get_a_panel_per_pair_and_no_empty_ones():
    """Four objectives: six panels; five: ten panels in a grid of twelve, two of them removed."""
    table = completions(num_prompts=10)
    extra = ["fourth", "fifth"]
    for name in extra:
        table = table.append_column(f"reward_{name}", table["reward_concise"])
    metrics = evaluate_completions(table, [*OBJECTIVES, *extra], draws=20, confidence=0.9, seed=0)
    assert len(figures.trade_off_figure(metrics).axes) == 10
    with pytest.raises(ValueError, match="at least two objectives"):
        figures.trade_off_figure(evaluate_completions(table, ["fifth"], draws=20, confidence=0.9, seed=0))


def test_the_kl_picture_has_every_candidate_at_its_kl_and_minimum(metrics):
    points = points_of(figures.kl_figure(metrics).axes[0])
    for name, candidate in metrics.candidates.items():
        assert points[metrics.label(name)][:2] == (candidate.kl.value, candidate.minimum_win_rate.value)


def test_training_curves_are_the_losses():
    curves = {"a": [(0.0, 0.7), (10.0, 0.5)], "b": [(0.0, 0.69), (10.0, 0.6)]}
    lines = figures.training_figure(curves).axes[0].lines
    assert {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in lines} == curves


def test_a_candidate_has_one_colour_in_all_pictures_and_no_two_share_one(metrics):
    bars = colours_of(figures.win_rate_figure(metrics))
    points = colours_of(figures.trade_off_figure(metrics))
    assert bars == {label: colour for label, colour in points.items() if label != "reference"}
    assert len(set(points.values())) == len(points) == 6
    assert bars["concise policy"] == figures.style("concise", OBJECTIVES)[0]
    assert len({figures.style(name, OBJECTIVES)[1] for name in metrics.candidates}) == 6


def test_soups_are_hollow_in_the_colour_of_the_mixture_at_their_weights(full):
    bars = {
        c.get_label(): c.patches[0] for c in figures.win_rate_figure(full).axes[0].containers if hasattr(c, "patches")
    }
    for soup, mixture in (("uniform soup", "uniform mixture"), ("soup at MPO's λ", "MPO mixture")):
        assert bars[soup].get_edgecolor() == bars[mixture].get_facecolor()
        assert to_hex(bars[soup].get_facecolor()) == "#ffffff"
        assert bars[soup].get_hatch()
        assert not bars[mixture].get_hatch()


def test_no_two_candidates_look_the_same(full):
    """Colour, marker and fill together, for every kind of candidate."""
    names = list(full.candidates)
    looks = {(*figures.style(name, OBJECTIVES, names), name in figures.HOLLOW) for name in names}
    assert len(looks) == len(names) == 11


def lines_of(axes, label: str) -> np.ndarray:
    """(N, 2) what the lines of a label go through."""
    return np.vstack([line.get_xydata() for line in axes.lines if line.get_label() == label])


def test_the_front_picture_has_every_point_of_the_grid_at_its_win_rates(full):
    """Mixtures and soups as two families, named candidates with their intervals, a panel per pair of objectives."""
    points = full.pareto.points
    figure = figures.pareto_figure(full, full.pareto)
    for axes, pair in zip(figure.axes, combinations(OBJECTIVES, 2), strict=True):
        assert (axes.get_xlabel(), axes.get_ylabel()) == tuple(f"win rate: {objective}" for objective in pair)
        for label, kind in (("mixtures, grid of λ", "mixture"), ("soups, grid of λ", "soup")):
            expected = [
                [point.win_rates[objective].value for objective in pair]
                for name, point in points.items()
                if name.startswith("grid-") and point.kind == kind
            ]
            assert sorted(lines_of(axes, label).tolist()) == sorted(expected)
        named = points_of(axes)
        for name in full.candidates:
            x, y, horizontal, vertical = named[full.label(name)]
            first, second = (points[name].win_rates[objective] for objective in pair)
            assert (x, y) == (first.value, second.value)
            ends = [e.value if end is None else end for e in (first, second) for end in (e.low, e.high)]
            np.testing.assert_allclose([*horizontal, *vertical], ends)


def test_a_sweep_of_mopo_s_policies_is_one_family_and_a_single_one_a_candidate():
    """Three or more are points of one look on the front, and nowhere by name; fewer are drawn like any other."""
    sweep = {f"mopo-{i}": Tendency(0.5 + 0.1 * i, 5.0 - 0.4 * i, 0.3, 1.0) for i in range(3)}
    candidates = records() | {name: Candidate("model", path=name) for name in sweep}
    table = completions(num_prompts=12, world={**WORLD, **sweep})
    many = evaluate_completions(table, OBJECTIVES, draws=20, confidence=0.9, seed=0)
    families = {"mixture": [*OBJECTIVES, "uniform", "mpo"], "mopo": list(sweep)}
    points = compare_points(table, OBJECTIVES, candidates, families, draws=20, confidence=0.9, seed=0)
    figure = figures.pareto_figure(many, points)
    assert "MOPO's policies" in legend_of(figure)
    assert not [label for label in legend_of(figure) if label.startswith("MOPO ")]
    [line] = [line for line in figure.axes[0].lines if line.get_label() == "MOPO's policies"]
    rates = [[points.points[name].win_rates[o].value for o in OBJECTIVES[:2]] for name in sweep]
    np.testing.assert_allclose(line.get_xydata(), rates)
    for picture in (figures.win_rate_figure, figures.trade_off_figure, figures.kl_figure):
        assert not [label for label in legend_of(picture(many)) if label.startswith("MOPO ")]
    one = table.filter(pc.invert(pc.is_in(table["candidate"], pa.array(["mopo-1", "mopo-2"]))))
    few = evaluate_completions(one, OBJECTIVES, draws=20, confidence=0.9, seed=0)
    assert "MOPO 0" in legend_of(figures.win_rate_figure(few))


def test_no_point_lies_above_the_stair_and_its_corners_are_points(full):
    """For every point some corner of the stair is at least as good on both objectives."""
    axes = figures.pareto_figure(full, full.pareto).axes[0]
    first, second = OBJECTIVES[:2]
    points = [(p.win_rates[first].value, p.win_rates[second].value) for p in full.pareto.points.values()]
    corners = [tuple(corner) for corner in lines_of(axes, "front of the two").tolist() if tuple(corner) in points]
    assert len(corners) > 2
    assert all(any(x <= cx and y <= cy for cx, cy in corners) for x, y in points)


def test_a_single_objective_has_no_front_to_draw(full):
    with pytest.raises(ValueError, match="at least two objectives"):
        figures.pareto_figure(replace(full, objectives=["positive"]), full.pareto)


def test_a_png_is_a_picture_of_the_figure_s_size_with_nothing_cut_off(metrics, full):
    """Every text, the legend's too, lies inside the picture."""
    drawn = [draw(metrics) for draw in (figures.win_rate_figure, figures.trade_off_figure, figures.kl_figure)]
    for figure in (*drawn, figures.win_rate_figure(full), figures.pareto_figure(full, full.pareto)):
        pixels = imread(io.BytesIO(png(figure)), format="png")
        width, height = (figure.get_size_inches() * DPI).astype(int)
        assert pixels.shape[:2] == (height, width)
        assert pixels[..., :3].std() > 0.05
        box = figure.get_tightbbox()  # inches
        assert box.x0 >= 0.0
        assert box.y0 >= 0.0
        assert box.x1 * DPI <= width + 1
        assert box.y1 * DPI <= height + 1
