"""A new objective is one more column: an objective that is added, or taken out, leaves the others' work as it is."""

import io
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from mpo_ray.config import RunConfig
from mpo_ray.run import Run
from mpo_ray.run_file import load_config
from mpo_ray.stages.pipeline import run_single
from mpo_ray.stages.stage import Context
from mpo_ray.storage import INPUTS
from tests import tiny_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

STAGES = ("data", "reference", "pairs", "policies", "samples", "scores")
ADDED = "detailed"


def _do(config: RunConfig) -> str:
    """Do the stages up to the scores; returns what they say."""
    said = io.StringIO()
    run_single(Context(config, Run.open(config, update=True), Console(file=said, width=200)), *STAGES)
    return said.getvalue()


def _written(run: Path) -> dict[str, int]:
    """When each file that took work was written, by its path."""
    nodes = ("base", "reference_logprobs", "policies", "samples", "scores")
    files = [path for node in nodes for path in (run / node).rglob("*") if path.is_file()]
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in files}


def _scores(run: Path) -> dict[str, list[dict[str, object]]]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted((run / "scores").glob("*.parquet"))}


def test_an_added_objective_costs_its_policy_its_samples_and_its_columns(finished_run: Path, tmp_path: Path) -> None:
    """Take an objective out and forget it, then add it: the scores are those of a run that had it from the start."""
    run = tmp_path / "unbroken"
    shutil.copytree(finished_run, run)
    config = load_config(tiny_run.CONFIG, tiny_run.overrides(tmp_path, "unbroken"))
    fewer = config.model_copy(update={"objectives": {n: o for n, o in config.objectives.items() if n != ADDED}})

    before = _written(run)
    said = _do(fewer)
    assert "policies/concise: trained from the same inputs; kept" in said
    assert "samples: 24 of 24 parts are there already" in said
    after = _written(run)
    gone = {path for path in before if path.startswith((f"samples/{ADDED}-", f"scores/{ADDED}-"))}
    assert set(before) - set(after) == gone
    assert len(gone) == 16
    assert {path for path in after if after[path] != before[path]} <= {p for p in after if p.startswith("scores/")}
    assert f"log_ratio_{ADDED}" not in pq.read_schema(run / "scores" / "reference-part-00000.parquet").names

    for node in ("comparisons", "reference_logprobs", "policies"):
        shutil.rmtree(run / node / ADDED)
    for directory in run.glob(f"training/{ADDED}-*"):
        shutil.rmtree(directory)
    numbers = json.loads((run / "samples" / "proposals.json").read_text())
    assert numbers.pop(ADDED) == 3
    (run / "samples" / "proposals.json").write_text(json.dumps(numbers))
    marked = _mark(run / "scores" / "concise-part-00000.parquet", "log_ratio_positive")

    before = _written(run)
    said = _do(config)
    assert "policies/positive: trained from the same inputs; kept" in said
    assert f"policies/{ADDED}: trained from the same inputs; kept" not in said
    assert "samples: 24 of 32 parts are there already" in said
    after = _written(run)
    redone = {path for path in before if after[path] != before[path]}
    assert redone == {path for path in before if path.startswith("scores/")} | {"samples/proposals.json"}
    found, expected = _scores(run), _scores(finished_run)
    assert [row.pop("log_ratio_positive") for row in found["concise-part-00000.parquet"]] == marked
    assert [len(rows) for rows in found.values()] == [len(rows) for rows in expected.values()]
    for name, rows in found.items():
        for row, other in zip(rows, expected[name], strict=True):
            assert {key: value for key, value in row.items() if not key.startswith("log_ratio")} == {
                key: value for key, value in other.items() if not key.startswith("log_ratio")
            }
            # One policy alone and three stacked are other sums of the same numbers.
            ratios = {key: value for key, value in row.items() if key.startswith("log_ratio")}
            assert ratios == pytest.approx({key: other[key] for key in ratios}, abs=1e-4)


def _mark(path: Path, column: str) -> list[float]:
    """Put numbers into a column that no model would give: they stay where the column is not computed again."""
    table = pq.read_table(path)
    marks = [1000.0 + row for row in range(table.num_rows)]
    index = table.column_names.index(column)
    assert INPUTS in table.schema.field(column).metadata
    pq.write_table(table.set_column(index, table.schema.field(column), [marks]), path)
    return marks
