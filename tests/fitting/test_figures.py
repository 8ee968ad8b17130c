"""The pictures of a fit hold its numbers: what is read back from their artists is what fit.json says."""

from __future__ import annotations

from copy import deepcopy
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex

from mpo_ray.config import Fit, MirrorSteps
from mpo_ray.data.scores import scores_from_table
from mpo_ray.drawing import GREY, objective_style
from mpo_ray.fitting import figures
from mpo_ray.fitting.figures import fit_figures
from mpo_ray.fitting.standalone import fit_scores
from mpo_ray.fitting.trade_off import best_minimum
from mpo_ray.fitting.trade_off_figure import CORNERS, barycentric
from tests.fitting.tables import NAMES, scores, worlds

SETTINGS = Fit(method="exact", bootstrap_draws=20, grid=4)
Drawn = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def three() -> Drawn:
    fit, trade_off = fit_scores(scores(worlds(6, spread=2.0), each=6), SETTINGS, seed=0, method="exact")
    paper, _ = fit_scores(
        scores(worlds(6, spread=2.0), each=6),
        SETTINGS.model_copy(update={"estimator": "paper"}),
        seed=0,
        method="exact",
    )
    return {**fit, "alternatives": {"paper": paper, "balanced": deepcopy(fit)}}, trade_off


@pytest.fixture(scope="module")
def two() -> Drawn:
    table = scores(worlds(6, spread=2.0, num_policies=2), each=6, proposals=("reference", *NAMES[:2]))
    return fit_scores(table, SETTINGS, seed=0, method="exact")


def four(*, rewards: bool = True) -> Drawn:
    rng = np.random.default_rng(0)
    table = pa.table({"prompt_id": [f"p{n // 6}" for n in range(30)], "sample_id": [n % 6 for n in range(30)]})
    for name in "abcd":
        table = table.append_column(f"log_ratio_{name}", pa.array(0.3 * rng.normal(size=30)))
        if rewards:
            table = table.append_column(f"reward_{name}", pa.array(rng.normal(size=30)))
    settings = SETTINGS.model_copy(update={"bootstrap_draws": 0})
    return fit_scores(scores_from_table(table), settings, seed=0, method="exact")


def with_some_unreliable(trade_off: dict[str, Any]) -> dict[str, Any]:
    changed = deepcopy(trade_off)
    for number, point in enumerate(changed["points"]):
        point["reliable"] = number % 3 != 1
    return changed


def decoded_points(names: tuple[str, ...]) -> dict[str, Any]:
    """Each policy alone, decoded to win rates of its own."""
    return {
        name: {
            "weights": {other: float(other == name) for other in names},
            "win_rates": {other: [0.5 + 0.1 * k, 0.4, 0.9] for k, other in enumerate(names, start=n)},
        }
        for n, name in enumerate(names)
    }


def labelled(axes: Any, label: str) -> Any:
    """The artist that the legend calls so."""
    handles, labels = axes.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))[label]


def legend_of(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_weights_stand_at_their_value_with_their_interval(three):
    fit, _ = three
    axes = fit_figures(fit, None)["weights"].axes[0]
    dots = labelled(axes, "this fit (exact, balanced estimator)")
    assert list(dots.get_xdata()) == list(fit["weights"].values())
    ends = [segment[:, 0] for segment in axes.collections[0].get_segments()]
    np.testing.assert_array_equal(ends, list(fit["intervals"]["weights"].values()))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(NAMES)
    assert {f"{value:.3f}" for value in fit["weights"].values()} == {text.get_text() for text in axes.texts}
    assert axes.get_xlabel() == "weight λ, with 95 % interval"


def test_other_fits_are_smaller_points_below_and_the_fit_s_own_twin_is_not_drawn(three):
    fit, _ = three
    axes = fit_figures(fit, None)["weights"].axes[0]
    _, labels = axes.get_legend_handles_labels()
    assert labels == ["this fit (exact, balanced estimator)", "exact, paper estimator", "uniform"]
    this, paper = (labelled(axes, label) for label in labels[:2])
    assert list(paper.get_xdata()) == list(fit["alternatives"]["paper"]["weights"].values())
    assert (paper.get_ydata() > this.get_ydata()).all()  # the axis points down
    assert axes.yaxis_inverted()
    assert paper.get_markersize() < this.get_markersize()


def test_given_weights_are_bars_of_their_size(three):
    given = {**three[0], "method": "fixed", "weights": {"warm": 0.7, "brief": 0.3, "exact": 0.0}, "trace": None}
    drawn = fit_figures(given, None)
    assert [patch.get_width() for patch in drawn["weights"].axes[0].patches] == [0.7, 0.3, 0.0]
    assert list(drawn) == ["weights", "balance"]


def test_the_gap_and_the_excess_of_f_are_drawn_where_they_are_above_0(three):
    """F(λ_t) − min F: here the lowest F is that of the other exact fit by the same estimator."""
    fit = deepcopy(three[0])
    fit["alternatives"]["balanced"]["objective_value"] = lowest = fit["objective_value"] - 1.0
    fit["trace"]["gap"][-1] = 0.0
    above, below = fit_figures(fit, None)["gap"].axes
    assert above.get_yscale() == "log"
    gap, excess = labelled(above, "gap, an upper bound of F(λ) − min F"), labelled(above, "F(λ) − the lowest F known")
    np.testing.assert_array_equal(gap.get_ydata(), fit["trace"]["gap"][:-1])
    np.testing.assert_allclose(excess.get_ydata(), np.array(fit["trace"]["objective_value"]) - lowest)
    for k, name in enumerate(NAMES):
        np.testing.assert_array_equal(labelled(below, name).get_ydata(), np.array(fit["trace"]["weights"])[:, k])
    assert (below.get_xlabel(), below.get_xscale()) == ("Newton step", "linear")


def test_another_estimator_s_f_is_no_bound_of_this_one_s(three):
    fit = deepcopy(three[0])
    fit["alternatives"]["paper"]["objective_value"] = -100.0
    assert figures.lowest_objective(fit) == pytest.approx(fit["objective_value"])


def test_mirror_descent_shows_the_iterates_behind_the_average(two):
    settings = Fit(method="bsmd", bsmd=MirrorSteps(steps=100), bootstrap_draws=0)
    table = scores(worlds(4, num_policies=2), each=4, proposals=("reference", *NAMES[:2]))
    fit, _ = fit_scores(table, settings, seed=0, method="bsmd")
    _, below = fit_figures(fit, None)["gap"].axes
    iterates, average = below.lines[:2]
    np.testing.assert_array_equal(iterates.get_ydata(), np.array(fit["trace"]["iterates"])[:, 0])
    np.testing.assert_array_equal(average.get_ydata(), np.array(fit["trace"]["weights"])[:, 0])
    assert iterates.get_linewidth() < average.get_linewidth()
    assert (below.get_xlabel(), below.get_xscale()) == ("step", "log")


def test_a_decoded_fit_shows_the_weights_and_gains_of_its_steps(three):
    steps = [
        {
            "weights": dict(zip(NAMES, weights, strict=True)),
            "gains": dict(zip(NAMES, gains, strict=True)),
            "standard_errors": dict.fromkeys(NAMES, 0.01),
        }
        for weights, gains in (((0.3, 0.3, 0.4), (0.1, 0.0, -0.1)), ((0.2, 0.3, 0.5), (0.05, 0.02, 0.04)))
    ]
    played = {**three[0], "method": "decoded", "decoded": {"gain": "win_rate", "steps": steps}}
    above, below = fit_figures(played, None)["gap"].axes
    for name in NAMES:
        assert list(labelled(above, name).get_ydata()) == [step["weights"][name] for step in steps]
    answers = [line for line in above.lines if line.get_marker() == "D"]
    assert [line.get_ydata()[0] for line in answers] == list(played["weights"].values())
    for name, bars in zip(NAMES, below.containers, strict=True):
        line, _, (errors,) = bars.lines
        assert list(line.get_ydata()) == [step["gains"][name] for step in steps]
        np.testing.assert_allclose([np.ptp(segment[:, 1]) for segment in errors.get_segments()], 0.02)
    assert "win rate − ½" in below.get_ylabel()


def test_the_balance_has_a_row_for_each_distribution_and_marks_its_smallest(three):
    fit, _ = three
    axes = fit_figures(fit, None)["balance"].axes[0]
    rows = ["mpo", "uniform", *NAMES, "reference"]
    for name in NAMES:
        dots = labelled(axes, name)
        assert list(dots.get_xdata()) == [fit["balance"][row][name] for row in rows]
        np.testing.assert_array_equal(np.round(dots.get_ydata()), np.arange(len(rows)))
        assert dots.get_color() == objective_style(name, NAMES)[0]
    bars = [c for c in axes.collections if to_hex(c.get_color()[0]) == "#333333"]
    assert [bar.get_segments()[0][0, 0] for bar in bars] == [min(fit["balance"][row].values()) for row in rows]
    shown = [tick.get_text() for tick in axes.get_yticklabels()]
    assert shown == ["this fit", "uniform weights", *(f"{name} policy" for name in NAMES), "reference"]


def test_barycentric_places_are_the_corners_their_midpoints_and_the_centre():
    """λ lies at Σ_k λ_k corner_k: a policy alone at its corner, half and half on the side between."""
    np.testing.assert_array_equal(barycentric(np.eye(3)), CORNERS)
    np.testing.assert_allclose(barycentric(np.array([[0.5, 0.5, 0.0]])), [[0.5, 0.0]])
    np.testing.assert_allclose(barycentric(np.full((1, 3), 1 / 3)), CORNERS.mean(axis=0)[None])
    sides = np.linalg.norm(CORNERS - np.roll(CORNERS, 1, axis=0), axis=1)
    np.testing.assert_allclose(sides, 1.0)


def test_three_objectives_are_the_simplex_coloured_by_the_smallest_win_rate(three):
    """Each reliable λ is a dot at its place, the others are grey crosses; ring and star mark the best and the fit."""
    trade_off = with_some_unreliable(three[1])
    figure = fit_figures(three[0], trade_off)["trade_off"]
    axes, points = figure.axes[0], trade_off["points"]
    places = barycentric(np.array([list(point["weights"].values()) for point in points]))
    reliable = np.array([point["reliable"] for point in points])
    minimum = np.array([min(value[0] for value in point["win_rates"].values()) for point in points])

    dots, crosses = labelled(axes, "predicted"), labelled(axes, "too few effective samples")
    np.testing.assert_allclose(dots.get_offsets(), places[reliable])
    np.testing.assert_allclose(dots.get_array(), minimum[reliable])
    np.testing.assert_allclose(crosses.get_offsets(), places[~reliable])
    assert {to_hex(colour).upper() for colour in crosses.get_facecolor()} == {GREY}
    np.testing.assert_allclose(labelled(axes, "this fit's λ").get_offsets(), places[:1])
    best = points.index(best_minimum(trade_off))
    np.testing.assert_allclose(labelled(axes, "best predicted minimum").get_offsets(), places[best : best + 1])
    assert [text.get_text() for text in axes.texts] == [f"{name} 1" for name in NAMES]
    for text, corner in zip(axes.texts, CORNERS, strict=True):
        np.testing.assert_array_equal(text.xy, corner)
    assert figure.axes[1].get_ylabel() == "minimum win rate"


def test_decoded_points_lie_on_the_simplex_with_their_own_minimum(three):
    figure = fit_figures(three[0], three[1], decoded_points(NAMES))["trade_off"]
    diamonds = labelled(figure.axes[0], "decoded, with its minimum win rate")
    np.testing.assert_allclose(diamonds.get_offsets(), CORNERS)
    np.testing.assert_allclose(diamonds.get_array(), [0.5, 0.6, 0.7])
    assert {"0.50", "0.60", "0.70"} <= {text.get_text() for text in figure.axes[0].texts}
    dots = labelled(figure.axes[0], "predicted")
    assert dots.get_clim() == diamonds.get_clim()  # one scale of colours for both


def test_a_legend_names_only_what_is_there(three):
    everywhere = deepcopy(three[1])
    for point in everywhere["points"]:
        point["reliable"] = True
    assert legend_of(fit_figures(three[0], everywhere)["trade_off"]) == [
        "predicted",
        "this fit's λ",
        "best predicted minimum",
    ]


def test_two_objectives_are_lines_over_the_first_weight_with_bands(two):
    """Sorted by λ, whatever order the file has; unreliable points grey; the fit's λ and the best one as lines."""
    fit, trade_off = two[0], with_some_unreliable(two[1])
    figure = fit_figures(fit, trade_off, decoded_points(NAMES[:2]))["trade_off"]
    axes = figure.axes[0]
    points = sorted(trade_off["points"], key=lambda point: point["weights"]["warm"])
    at = [point["weights"]["warm"] for point in points]
    doubtful = [point["weights"]["warm"] for point in points if not point["reliable"]]
    bands = [shape for shape in axes.collections if isinstance(shape, PolyCollection)]
    for n, name in enumerate(NAMES[:2]):
        line = labelled(axes, f"{name}, predicted")
        assert list(line.get_xdata()) == at
        assert list(line.get_ydata()) == [point["win_rates"][name][0] for point in points]
        band = bands[n].get_paths()[0].vertices[:, 1]
        assert band.min() == min(point["win_rates"][name][1] for point in points)
        assert band.max() == max(point["win_rates"][name][2] for point in points)
        grey = [one for one in axes.lines if one.get_color() == GREY and len(one.get_xdata())][n]
        assert list(grey.get_xdata()) == doubtful
        found = labelled(axes, f"{name}, decoded").lines[0]
        assert list(found.get_xdata()) == [1.0, 0.0]
        assert list(found.get_ydata()) == [point["win_rates"][name][0] for point in decoded_points(NAMES[:2]).values()]
    own, best = fit["weights"]["warm"], best_minimum(trade_off)["weights"]["warm"]
    assert list(labelled(axes, f"this fit, λ = {own:.3f}").get_xdata()) == [own, own]
    assert list(labelled(axes, f"best predicted minimum, λ = {best:.3f}").get_xdata()) == [best, best]
    assert axes.get_xlabel() == "weight λ of warm (of brief: 1 − λ)"


def test_more_objectives_are_pairs_of_win_rates():
    fit, trade_off = four()
    trade_off = with_some_unreliable(trade_off)
    figure = fit_figures(fit, trade_off, decoded_points(tuple("abcd")))["trade_off"]
    for axes, pair in zip(figure.axes, combinations("abcd", 2), strict=True):
        rates = np.array([[point["win_rates"][name][0] for name in pair] for point in trade_off["points"]])
        reliable = np.array([point["reliable"] for point in trade_off["points"]])
        np.testing.assert_allclose(labelled(axes, "predicted").get_offsets(), rates[reliable])
        np.testing.assert_allclose(labelled(axes, "too few effective samples").get_offsets(), rates[~reliable])
        np.testing.assert_allclose(labelled(axes, "this fit").get_offsets(), rates[:1])
        assert len(labelled(axes, "decoded").get_offsets()) == 4
        assert (axes.get_xlabel(), axes.get_ylabel()) == (f"win rate: {pair[0]}", f"win rate: {pair[1]}")


def test_without_rewards_there_is_no_trade_off_to_draw():
    assert "trade_off" not in fit_figures(*four(rewards=False))


def test_without_samples_of_the_reference_the_rewards_are_drawn(three):
    """No win rates: a simplex for each objective's mean reward, which have no common unit."""
    table = scores(worlds(4), each=3, proposals=NAMES)
    fit, trade_off = fit_scores(table, SETTINGS, seed=0, method="exact")
    figure = fit_figures(fit, trade_off, decoded_points(NAMES))["trade_off"]
    bars = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert bars == [f"mean reward: {name}" for name in NAMES]
    assert "decoded, with its minimum win rate" not in legend_of(figure)


def test_nothing_is_cut_off_and_no_legend_lies_on_a_panel(three, two):
    """Every text lies inside the picture, also with long names; the legend ends above the panels."""
    long = {name: f"{name} and everything that goes with it" for name in NAMES}

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {long.get(key, key): renamed(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [renamed(item) for item in value]
        return long.get(value, value)

    for fit, trade_off in (three, two, renamed(three)):
        for name, figure in fit_figures(fit, trade_off).items():
            figure.draw_without_rendering()
            box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()  # inches
            inside = (box.x0 >= -0.01, box.y0 >= -0.01, box.x1 <= width + 0.01, box.y1 <= height + 0.01)
            assert all(inside), (name, box)
            if figure.legends:
                tops = [axes.get_window_extent().y1 for axes in figure.axes]
                assert figure.legends[0].get_window_extent().y0 >= max(tops) - 1
