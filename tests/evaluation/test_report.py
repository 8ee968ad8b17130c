"""The report: one self-contained page that says what the metrics say, whatever the completions contain."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest

from mpo_ray.config import Fit
from mpo_ray.data.scores import scores_from_table
from mpo_ray.evaluation.estimates import Estimate, number
from mpo_ray.evaluation.estimates import written as written_as
from mpo_ray.evaluation.fit_section import fit_pictures
from mpo_ray.evaluation.metrics import Metrics
from mpo_ray.evaluation.pareto import Hypervolume, Pareto, Point
from mpo_ray.evaluation.report import SHOWN_CHARACTERS, SHOWN_PROMPTS, write_report
from mpo_ray.evaluation.verdict import verdict
from mpo_ray.fitting.standalone import fit_scores
from mpo_ray.records import encode_prompt
from tests.evaluation.world import (
    OBJECTIVES,
    completions,
    evaluate_completions,
    evaluated,
    fit,
    predicted,
    scores,
    trade_off,
)

CONFLICT = [
    {"first": "positive", "second": "concise", "sentence": "positive and concise are unrelated: 52% of 90 pairs."}
]


class Page(HTMLParser):
    """Elements and text of a page, and every address in it."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.headings: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_endtag(self, tag):
        self.text += " "
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def report(directory: Path, **changes: object) -> str:
    table = changes.get("completions")
    table = completions(num_prompts=30) if table is None else table
    arguments = {
        "run_name": "quickstart",
        "metrics": evaluated(table),
        "fit": fit(),
        "trade_off": trade_off(),
        "predicted": predicted(),
        "completions": table,
        "counts": {o: {"comparisons": 2900 + n, "refused": {"empty": 7}} for n, o in enumerate(OBJECTIVES)},
        "conflict": CONFLICT,
        "provenance": {"versions": {"torch": "2.13.0"}, "seed": 11, "config_digest": "cafe" * 16},
        "training": {
            o: {
                "steps": 90,
                "heldout": {"loss": 0.4321, "accuracy": 0.83, "margin": 1.25},
                "history": [{"step": s, "loss": 0.7 - s / 400} for s in range(0, 90, 10)],
            }
            for o in OBJECTIVES
        },
    }
    path = write_report(directory, **{**arguments, **changes})
    assert path == directory / "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("run") / "evaluation"
    return directory, report(directory)


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_the_page_needs_nothing_from_elsewhere(written):
    """Every address is a data URI, there is no script, and the style imports nothing."""
    page = Page(written[1])
    assert len(page.addresses) == 8
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert not re.search(r"@import|url\(|https?://", written[1])


def test_the_embedded_pictures_are_the_files_beside_it(written):
    directory, source = written
    embedded = {base64.b64decode(address.split(",")[1]) for address in Page(source).addresses}
    names = ["win_rates", "trade_off", "kl", "training", "weights", "gap", "balance", "predicted_trade_off"]
    assert embedded == {(directory / f"{name}.png").read_bytes() for name in names}
    assert all(png.startswith(b"\x89PNG") for png in embedded)


def test_metrics_json_holds_the_metrics(written):
    loaded = Metrics.from_json(json.loads((written[0] / "metrics.json").read_text()))
    assert loaded == evaluated(completions(num_prompts=30))


def test_the_page_shows_every_number_of_the_table_and_the_verdict(written):
    metrics = evaluated(completions(num_prompts=30))
    text = squeezed(Page(written[1]).text)
    assert verdict(metrics).sentence in text
    for name, candidate in metrics.candidates.items():
        row = [f"{number(e.value)} [{number(e.low)}, {number(e.high)}]" for e in candidate.rewards.values()]
        assert f"{metrics.label(name)} {' '.join(row)}" in text
        if name != "reference":
            win = candidate.win_rates["positive"]
            assert f"{metrics.label(name)} {number(win.value)} [{number(win.low)}, {number(win.high)}]" in text


def test_the_page_says_which_mixture_is_decoded(written):
    assert "All mixtures are token-level" in Page(written[1]).text
    assert "particles" not in Page(written[1]).text


def test_the_page_says_so_where_mixtures_are_drawn_whole(tmp_path):
    text = squeezed(Page(report(tmp_path, metrics=replace(evaluated(), particles=8))).text)
    assert "drawn by sequential Monte Carlo with 8 particles" in text
    assert "All mixtures are token-level" not in text


def test_every_part_is_there(written):
    page = Page(written[1])
    assert page.headings == [
        "Candidates",
        "Weights",
        "Predicted trade-off",
        "Trade-off",
        "Completions side by side",
        "Data",
        "Single policies",
        "Provenance",
    ]
    text = squeezed(page.text)
    assert "objective comparisons refused: empty positive 2900 7 concise 2901 7 detailed 2902 7" in text
    assert CONFLICT[0]["sentence"] in text
    assert "policy steps held-out loss held-out accuracy held-out margin positive 90 0.4321 0.83 1.25" in text
    assert "versions: torch 2.13.0 seed 11 config digest cafe" in text


def test_a_few_prompts_are_shown_with_a_completion_of_every_candidate(written):
    assert written[1].count('class="prompt"') == SHOWN_PROMPTS
    assert len(re.findall(r'class="card( mpo)?"', written[1])) == SHOWN_PROMPTS * 6
    first = completions(num_prompts=30).slice(0, 12).to_pylist()
    text = Page(written[1]).text
    for row in first:
        assert (row["response"] in text) or row["completion_id"] == 1


def test_text_from_models_and_data_is_escaped(tmp_path):
    """A completion, a prompt, a reason and a version that are markup appear as text and do nothing."""
    attack = "</div><script>alert('x')</script><img src=https://example.org/x onerror=alert(1)>"
    table = completions(num_prompts=5)
    for column in ("prompt", "response"):
        index = table.column_names.index(column)
        table = table.set_column(index, column, pa.array([attack] * table.num_rows))
    source = report(
        tmp_path,
        completions=table,
        counts={"positive": {attack: 1}},
        conflict=[{"sentence": attack}],
        provenance={"config": attack},
        run_name=attack,
    )
    page = Page(source)
    assert "script" not in page.tags
    assert page.tags.count("img") == 8
    assert page.text.count(attack) == 2 + 4 * (1 + 6) + 1 + 1 + 1  # title, h1, 4 prompts of 6, the others


def test_chat_prompts_are_shown_turn_by_turn(tmp_path):
    chat, _ = encode_prompt(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Thé ou café ?"}))
    table = completions(num_prompts=3)
    table = table.set_column(table.column_names.index("prompt"), "prompt", pa.array([chat] * table.num_rows))
    table = table.set_column(table.column_names.index("is_chat"), "is_chat", pa.array([True] * table.num_rows))
    assert "system Be brief. user Thé ou café ?" in squeezed(Page(report(tmp_path, completions=table)).text)


def test_a_long_completion_is_cut_and_says_by_how_much(tmp_path):
    table = completions(num_prompts=3)
    long = "a" * (SHOWN_CHARACTERS + 123)
    table = table.set_column(table.column_names.index("response"), "response", pa.array([long] * table.num_rows))
    source = report(tmp_path, completions=table)
    assert "a" * SHOWN_CHARACTERS + " … (123 more characters)" in source
    assert long not in source


def given() -> dict[str, object]:
    """Weights that were not fitted: no trace, no intervals, nothing to compare with."""
    settings = Fit(method="fixed", weights={"positive": 0.2, "concise": 0.3, "detailed": 0.5})
    return fit_scores(scores(), settings, seed=0, method="fixed")[0] | {"warnings": []}


def test_given_weights_and_absent_parts_leave_a_smaller_page(tmp_path):
    """No trace, no predictions, no other fits; no conflict, no training, no counts."""
    absent = {"counts": {}, "conflict": None, "training": {}, "provenance": {}, "trade_off": None, "predicted": {}}
    source = report(tmp_path, fit=given(), **absent)
    page = Page(source)
    assert page.headings == ["Candidates", "Weights", "Trade-off", "Completions side by side"]
    assert "Other fits" not in page.text
    assert (tmp_path / "weights.png").is_file()
    assert not any((tmp_path / f"{name}.png").exists() for name in ("gap", "predicted_trade_off", "training"))
    assert 'class="caution"' not in source


def test_the_weights_are_shown_with_interval_balance_gain_and_certificate(written):
    text, found = squeezed(Page(written[1]).text), fit()
    for name, value in found["weights"].items():
        low, high = found["intervals"]["weights"][name]
        at = [found["balance"][point][name] for point in ("mpo", "reference")]
        gain = f"{at[0] - at[1]:+z.3f}"
        assert f"{name} {value:.3f} [{low:z.3f}, {high:z.3f}] {at[0]:z.3f} {at[1]:z.3f} {gain}" in text
    low, high = found["intervals"]["objective_value"]
    assert f"F(λ), nats {found['objective_value']:.4f} [{low:.4f}, {high:.4f}] gap, nats {found['gap']:.1e}" in text
    assert "24 prompts × 16 responses, drawn by: reference 96, positive 96, concise 96, detailed 96" in text


def test_a_decoded_fit_shows_the_gain_of_its_answer_and_has_no_interval_of_f(tmp_path):
    gains, errors = {"positive": 0.05, "concise": 0.061, "detailed": -0.0104}, dict.fromkeys(OBJECTIVES, 0.012)
    step = {"weights": dict.fromkeys(OBJECTIVES, 1 / 3), "gains": gains, "standard_errors": errors}
    played = {"gain": "win_rate", "gains": gains, "standard_errors": errors, "steps": [step, step]}
    found = {**fit(), "method": "decoded", "decoded": played}
    found["intervals"]["objective_value"] = None
    text = squeezed(Page(report(tmp_path, fit=found)).text)
    assert "decoded gain, win rate − ½ binds" in text
    assert "+0.061 ± 0.012" in text
    assert f"F(λ), nats {found['objective_value']:.4f} gap" in text
    assert "found on what is decoded" in text


def test_the_balance_table_ends_each_row_with_its_minimum(written):
    text = squeezed(Page(written[1]).text)
    for point, label in {"mpo": "this fit", "concise": "concise policy", "reference": "reference"}.items():
        values = [fit()["balance"][point][name] for name in OBJECTIVES]
        assert f"{label} {' '.join(f'{value:z.3f}' for value in [*values, min(values)])}" in text


def test_what_is_left_out_has_no_weight_and_its_loss_is_shown(written):
    text = squeezed(Page(written[1]).text)
    other = fit()["leave_one_out"]["concise"]
    weights = f"{other['weights']['positive']:.3f} – {other['weights']['detailed']:.3f}"
    gains = " ".join(f"{other['gains'][name]:+z.3f}" for name in OBJECTIVES)
    assert f"without concise {weights} {other['objective_value']:z.4f} {gains}" in text


def test_other_fits_stand_beside_this_one_with_their_cautions(tmp_path):
    found = fit()
    found["alternatives"]["paper"]["warnings"] = ["Too few; set `fit.estimator` to <balanced>."]
    page = Page(source := report(tmp_path, fit=found))
    text = squeezed(page.text)
    weights = {n: " ".join(f"{v:z.3f}" for v in o["weights"].values()) for n, o in found["alternatives"].items()}
    assert f"exact, paper estimator {weights['paper']}" in text
    assert f"exact, balanced estimator {weights['balanced']}" in text
    assert "exact, paper estimator: Too few; set fit.estimator to <balanced>." in text
    assert "<code>fit.estimator</code> to &lt;balanced&gt;" in source


def test_predictions_stand_above_what_decoding_gave(written):
    """Each candidate with known weights, and no other, has both rows."""
    text, metrics = squeezed(Page(written[1]).text), evaluated(completions(num_prompts=30))
    for name, point in predicted().items():
        rates = [point["win_rates"][o] for o in OBJECTIVES]
        shown = [f"{v:.2f} [{low:.2f}, {high:.2f}]" for v, low, high in rates]
        assert f"{metrics.label(name)}, predicted {' '.join(shown)} {min(rate[0] for rate in rates):.2f}" in text
        decoded = [metrics.candidates[name].win_rates[o] for o in OBJECTIVES]
        assert f"{metrics.label(name)}, decoded {' '.join(written_as(e) for e in decoded)}" in text
    assert "reference, predicted" not in text


def test_candidates_that_were_not_decoded_are_left_out_of_the_comparison(tmp_path):
    source = report(tmp_path, predicted={"other": predicted()["uniform"]})
    assert ", predicted" not in squeezed(Page(source).text)


def test_candidates_with_the_same_weights_are_one_decoded_point():
    """Else their labels would lie on one another."""
    twice = {name: predicted()["uniform"] for name in ("uniform", "mpo")} | {"positive": predicted()["positive"]}
    figure, _ = fit_pictures(fit(), trade_off(), twice, evaluated())["predicted_trade_off"]
    values = [text.get_text() for text in figure.axes[0].texts if text.get_text()[0].isdigit()]
    assert values == [f"{evaluated().candidates[name].minimum_win_rate.value:.2f}" for name in ("mpo", "positive")]


def test_the_grid_s_mixtures_are_decoded_points_and_its_soups_are_not():
    rates = {objective: Estimate(0.31 + 0.1 * k, 0.2, 0.8) for k, objective in enumerate(OBJECTIVES)}
    weights = dict(zip(OBJECTIVES, (0.5, 0.5, 0.0), strict=True))
    others = dict(zip(OBJECTIVES, (0.0, 0.5, 0.5), strict=True))
    points = {"grid-0": Point("mixture", weights, rates), "grid-soup-1": Point("soup", others, rates)}
    pareto = Pareto(points, [], Hypervolume(Estimate(0.1), None, None, 1, dict.fromkeys(OBJECTIVES, 0.0)), 30)
    figure, _ = fit_pictures(fit(), trade_off(), {}, replace(evaluated(), pareto=pareto))["predicted_trade_off"]
    assert [text.get_text() for text in figure.axes[0].texts if text.get_text()[0].isdigit()] == ["0.31"]


def test_a_fit_s_cautions_are_on_the_page(tmp_path):
    source = report(tmp_path, fit={**fit(), "warnings": ["The weights are at a vertex."], "alternatives": {}})
    assert '<p class="caution">The weights are at a vertex.' in squeezed(source)


def test_one_objective_has_a_report_without_a_trade_off(tmp_path):
    table = completions(num_prompts=5)
    metrics = evaluate_completions(table, ["positive"], draws=50, confidence=0.9, seed=0)
    rows = {"prompt_id": ["a", "a", "b", "b"], "sample_id": [0, 1, 0, 1], "log_ratio_positive": [0.1, 0.2, -0.3, 0.1]}
    one = scores_from_table(pa.table(rows), min_objectives=1)
    found, surface = fit_scores(one, Fit(method="exact"), seed=0, method="exact")
    source = report(tmp_path, metrics=metrics, fit=found, trade_off=surface, predicted={}, completions=table)
    assert not any((tmp_path / f"{name}.png").exists() for name in ("trade_off", "predicted_trade_off"))
    assert "positive policy" in Page(source).text
