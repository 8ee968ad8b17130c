"""`mpo-ray mopo --table`: what it writes, and what it refuses before it writes anything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpo_ray.cli import main
from mpo_ray.maths.constrained import solve_lagrangian
from mpo_ray.maths.pool import Pool
from mpo_ray.records import Bound


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two opposed objectives on 30 prompts of 6 candidates, and one that agrees with the first."""
    rng = np.random.default_rng(0)
    helpful = rng.uniform(size=180)
    columns = {
        "prompt_id": np.repeat([f"p{i}" for i in range(30)], 6),
        "response_id": np.tile(np.arange(6), 30),
        "win_helpful": helpful,
        "win_harmless": 0.7 * (1 - helpful) + 0.3 * rng.uniform(size=180),
        "win_honest": helpful,
    }
    pq.write_table(pa.table(columns), tmp_path / "pool.parquet")
    return tmp_path / "pool.parquet"


def solve(path: Path, *arguments: str) -> int:
    return main(["mopo", "--table", str(path), "--primary", "helpful", "--out", str(path.parent / "out"), *arguments])


def test_the_files_hold_the_optimum_and_rho_of_every_row(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(path, "--bound", "harmless=0.48", "--bound", "honest=reference - 0.02", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    stored = json.loads((path.parent / "out" / "mopo.json").read_text())
    assert printed == {"out": str(path.parent / "out"), **stored}
    table = pq.read_table(path)
    secondary = np.column_stack([table["win_harmless"], table["win_honest"]])
    pool = Pool.of_samples(np.array(table["win_helpful"]), secondary, np.arange(31) * 6)
    bounds = np.array([0.48, secondary[:, 1].mean() - 0.02])
    expected = solve_lagrangian(pool, bounds, tau=0.08)
    assert stored["multipliers"] == pytest.approx(dict(zip(("harmless", "honest"), expected.multipliers, strict=True)))
    assert stored["values"]["harmless"] == pytest.approx(0.48, abs=1e-9)
    assert stored["bounds"]["honest"] == pytest.approx(bounds[1])
    assert stored["binding"] == ["harmless"]
    assert stored["chi"] == {"harmless": None, "honest": None}
    assert stored["correlation"]["harmless"] < -0.8
    assert stored["correlation"]["honest"] == pytest.approx(1.0)
    rows = pq.read_table(path.parent / "out" / "ratio.parquet")
    np.testing.assert_allclose(rows["ratio"].to_numpy(), expected.ratio)
    assert rows["response_id"].to_pylist() == table["response_id"].to_pylist()


def test_the_summary_has_the_numbers_and_says_where_they_are(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(path, "--bound", "harmless=0.45", "--radius", "0.001") == 0
    text = capsys.readouterr().out
    stored = json.loads((path.parent / "out" / "mopo.json").read_text())
    assert stored["robust_values"]["harmless"] == pytest.approx(0.45, abs=1e-6)
    assert stored["values"]["harmless"] > 0.46
    assert stored["chi"]["harmless"] > 0
    for shown in ("harmless", f"{stored['values']['harmless']:.3f}", f"{stored['multipliers']['harmless']:.3f}", "yes"):
        assert shown in text
    assert text.rstrip().endswith(f"{path.parent}/out/mopo.json\n{path.parent}/out/ratio.parquet")


def test_the_barrier_stays_inside_its_bound(path: Path) -> None:
    assert solve(path, "--bound", "harmless=0.45", "--variant", "barrier", "--sigma", "0.02") == 0
    stored = json.loads((path.parent / "out" / "mopo.json").read_text())
    slack = stored["values"]["harmless"] - 0.45
    assert slack > 0.005
    assert stored["multipliers"]["harmless"] * slack == pytest.approx(0.02, rel=1e-6)


def test_objectives_that_agree_are_said_to_leave_nothing_to_trade(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert solve(path, "--bound", "honest=0.4") == 0
    assert "No bound binds: the objectives agree here" in " ".join(capsys.readouterr().out.split())


def test_an_optimum_that_was_not_reached_is_not_passed_off_as_one(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpo_ray.maths.constrained.MAX_ROUNDS", 1)
    assert solve(path, "--bound", "harmless=0.45", "--radius", "0.001") == 0
    assert "The solver stopped with a residual of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bound", "helpful=0.5"], "the primary objective 'helpful' is maximised, and cannot be bounded as well"),
        (["--bound", "hamless=0.5"], "unknown objective 'hamless': there is no column 'win_hamless'. The pool has hel"),
        (["--bound", "harmless=1.5"], "bound harmless: '1.5' is no win probability. Write a number in [0, 1]"),
        (["--bound", "harmless=reference + 0.7"], "from what the reference has, is outside [0, 1]"),
        (["--bound", "harmless=reference 0.1"], "bound harmless: 'reference 0.1' is no win probability"),
        (["--bound", "harmless"], "--bound 'harmless': write NAME=VALUE, once for each objective"),
        (["--bound", "harmless=0.4", "--bound", "harmless=0.5"], "write NAME=VALUE, once for each objective"),
        (["--bound", "harmless=0.5", "--tau", "0"], "tau: 0.0 is no strength of the KL penalty"),
        (["--bound", "harmless=0.5", "--radius", "-1"], "radius: -1.0 is no radius in KL divergence"),
        (["--bound", "harmless=0.5", "--variant", "barrier", "--sigma", "0"], "sigma: 0.0 is not above 0"),
        (["--bound", "harmless=0.5", "--sigma", "0.1"], "--sigma 0.1 is the strength of the barrier; give --variant"),
        (["--bound", "harmless=0.95"], "bound harmless ≥ 0.9500 cannot be met: the best that any policy on this pool"),
        (["--bound", "harmless=0.5", "--radius", "0.5"], "bound harmless: its multiplier reached"),
    ],
)
def test_what_makes_no_problem_is_refused_and_nothing_is_written(
    path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert solve(path, *arguments) == 1
    assert message in capsys.readouterr().err
    assert not (path.parent / "out").exists()


def test_a_relative_bound_is_what_the_reference_has_and_a_difference() -> None:
    assert Bound.parse("x", "reference - 0.02").at(0.5) == pytest.approx(0.48)
    assert Bound.parse("x", "reference").at(0.47) == pytest.approx(0.47)
    assert Bound.parse("x", 0.55).at(0.1) == 0.55
