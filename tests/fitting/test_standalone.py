"""`mpo-ray fit --table` and `--at`: any table in, files and figures out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from mpo_ray.cli import main
from mpo_ray.config import Fit
from mpo_ray.data.score_files import ScoreTableError
from mpo_ray.fitting.standalone import available_estimators, fit_file, usable_estimator
from tests.fitting.tables import NAMES, score_rows, scores, worlds


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "scores.parquet"
    pq.write_table(score_rows(worlds(20), each=4), path)
    return path


def test_a_table_alone_is_fitted_described_and_drawn(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fit.json with the certificate, trade_off.json that begins with the fit's λ, pictures; the paths are printed."""
    out = table.parent / "out"
    assert main(["fit", "--table", str(table), "--out", str(out), "--bootstrap-draws", "20"]) == 0
    printed = capsys.readouterr().out
    fit = json.loads((out / "fit.json").read_text())
    assert fit["gap"] <= 1e-8
    assert (fit["method"], fit["estimator"]) == ("exact", "balanced")
    trade_off = json.loads((out / "trade_off.json").read_text())
    assert trade_off["points"][0]["weights"] == pytest.approx(fit["weights"])
    assert len(trade_off["points"]) == 67
    assert {path.suffix for path in out.iterdir()} == {".json", ".png"}
    for path in out.iterdir():
        assert str(path) in printed.replace("\n", "") or str(path) in printed
    assert f"{fit['weights']['warm']:.3f}" in printed


def test_the_same_table_as_csv_and_in_pieces_gives_the_same_weights(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The format and the order of files do not matter; --json prints what fit.json holds."""
    rows = pq.read_table(table)
    pyarrow.csv.write_csv(rows.slice(0, 100), table.parent / "part-1.csv")
    pyarrow.csv.write_csv(rows.slice(100), table.parent / "part-2.csv")
    found = []
    for given in ([str(table)], [str(table.parent / "part-2.csv"), str(table.parent / "part-1.csv")]):
        out = table.parent / f"out{len(found)}"
        assert main(["fit", "--table", *given, "--out", str(out), "--bootstrap-draws", "0", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["weights"] == pytest.approx(found[1]["weights"], abs=1e-6)
    assert found[1]["out"] == str(table.parent / "out1")


def test_methods_are_chosen_on_the_command_line(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bsmd with its steps, fixed with its weights, the paper's estimator."""
    common = ["--table", str(table), "--out", str(table.parent / "out"), "--bootstrap-draws", "0", "--json"]
    assert main(["fit", *common, "--method", "bsmd", "--steps", "50", "--estimator", "paper"]) == 0
    bsmd = json.loads(capsys.readouterr().out)
    assert (bsmd["method"], bsmd["estimator"], bsmd["trace"]["steps"][-1]) == ("bsmd", "paper", 50)
    assert main(["fit", *common, "--weights", "warm=0.25,brief=0.75"]) == 0
    fixed = json.loads(capsys.readouterr().out)
    assert fixed["weights"] == {"warm": 0.25, "brief": 0.75, "exact": 0.0}
    assert fixed["method"] == "fixed"


def test_one_lambda_is_answered_without_a_fit(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--at: rewards, win rates, KL, length with intervals; nothing is written."""
    before = set(table.parent.iterdir())
    assert main(["fit", "--table", str(table), "--at", "warm=0.7,brief=0.3", "--json"]) == 0
    point = json.loads(capsys.readouterr().out)["points"][0]
    assert point["weights"] == {"warm": 0.7, "brief": 0.3, "exact": 0.0}
    assert set(point["win_rates"]) == set(NAMES)
    low, value, high = (point["win_rates"]["warm"][i] for i in (1, 0, 2))
    assert low <= value <= high
    assert main(["fit", "--table", str(table), "--at", "warm=0.7,brief=0.3"]) == 0
    assert "win rate, brief" in capsys.readouterr().out
    assert set(table.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "give a run file, or a score table"),
        (["run.yaml", "--table", "t.parquet"], "one of the two"),
        (["--table", "{table}"], "--out DIR is missing"),
        (["--table", "{table}", "--out", "{table}"], "is a file; give a directory"),
        (["--table", "{table}", "--out", "{out}", "--weights", "warm"], "is not objective=weight"),
        (["--table", "{table}", "--out", "{out}", "--weights", "warm=0.5"], "sum to 0.5, not 1"),
        (["--table", "{table}", "--out", "{out}", "--method", "fixed"], "weights go with method `fixed`"),
        (["--table", "{table}", "--out", "{out}", "--steps", "0"], "bsmd.steps: Input should be greater than 0"),
        (["--table", "{table}", "--at", "warn=1.0"], "--at: unknown objective 'warn'"),
        (["--table", "{out}/none.parquet", "--out", "{out}"], "none.parquet"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    arguments: list[str], complaint: str, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 1 and one message; no output directory is left behind."""
    out = table.parent / "out"
    given = [argument.format(table=table, out=out) for argument in arguments]
    assert main(["fit", *given]) == 1
    assert complaint in capsys.readouterr().err
    assert not out.exists()


def test_the_decoded_fit_needs_models(table: Path) -> None:
    """A table holds no policies to decode with."""
    with pytest.raises(ValueError, match="plays with models, a table has none"):
        fit_file([str(table)], table.parent / "out", Fit(method="decoded"))


def test_the_estimator_follows_from_who_drew() -> None:
    """The paper's needs the reference's samples; with only these the balanced one is the paper's."""
    of = worlds(4)
    policies, reference = (scores(of, each=3, proposals=p) for p in (NAMES, ("reference",)))
    assert usable_estimator(reference, "balanced") == "paper"
    assert available_estimators(reference) == ["paper"]
    assert available_estimators(policies) == ["balanced"]
    assert available_estimators(scores(of, each=3)) == ["paper", "balanced"]
    with pytest.raises(ScoreTableError, match="needs samples of the reference"):
        usable_estimator(policies, "paper")
