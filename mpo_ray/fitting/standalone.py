"""A fit without a run: any score table in, fit.json, trade_off.json and their pictures out (design 5.2)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpo_ray.config import Fit
from mpo_ray.data.score_files import ScoreTableError
from mpo_ray.data.scores import ScoreTable, open_scores
from mpo_ray.drawing import png
from mpo_ray.fitting.figures import fit_figures
from mpo_ray.fitting.table_fit import Estimator, fit_table
from mpo_ray.fitting.trade_off import grid_of, predict_trade_off
from mpo_ray.fitting.trust import warnings
from mpo_ray.whole_files import write_file


def fit_file(paths: Sequence[str], out: Path, settings: Fit, *, seed: int = 0) -> dict[str, Any]:
    """Fit the table in `paths` and write what is known of it into `out`; returns what fit.json holds.

    Raises ScoreTableError for a table that cannot be used, ValueError for `method: decoded`, which needs models.
    """
    if settings.method == "decoded":
        raise ValueError("method `decoded` plays with models, a table has none; choose exact, bsmd or fixed.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a directory, which is made if it is not there.")
    scores = open_scores(list(paths))
    fit, trade_off = fit_scores(scores, settings, seed=seed, method=settings.method)
    for name, value in {"fit.json": fit, "trade_off.json": trade_off}.items():
        write_file(out / name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
    for name, figure in fit_figures(fit, trade_off).items():
        write_file(out / f"{name}.png", png(figure))
    return fit


def fit_scores(
    scores: ScoreTable, settings: Fit, *, seed: int, method: str, beta: float | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fit with its warnings, and the predicted trade-off, whose first point is the fit's own λ."""
    fit = fit_table(
        scores, settings, seed=seed, method=method, estimator=usable_estimator(scores, settings.estimator), beta=beta
    )
    trade_off = trade_off_of(scores, fit, settings, seed=seed)
    return fit | {"warnings": warnings(scores, fit, trade_off)}, trade_off


def trade_off_of(scores: ScoreTable, fit: Mapping[str, Any], settings: Fit, *, seed: int) -> dict[str, Any]:
    """Predictions on a grid of the simplex; the fit's own λ comes first."""
    own = np.array([list(fit["weights"].values())])
    return predict_trade_off(
        scores,
        np.vstack([own, grid_of(len(scores.objectives), settings.grid)]),
        estimator=fit["estimator"],
        draws=settings.bootstrap_draws,
        confidence=settings.confidence,
        seed=seed,
    )


def available_estimators(scores: ScoreTable) -> list[Estimator]:
    """The estimators that this table serves: the paper's needs 2 of the reference's responses for every prompt."""
    by_reference = np.add.reduceat((scores.drawn_by == 0).astype(np.int64), scores.starts[:-1])
    paper: list[Estimator] = ["paper"] if by_reference.min() >= 2 else []
    return [*paper, "balanced"] if scores.drawn_by.any() else paper


def usable_estimator(scores: ScoreTable, wanted: Estimator) -> Estimator:
    """`paper` where π_ref drew every row: the two are then the same. Raises ScoreTableError if π_ref drew none."""
    if wanted == "paper" and not (scores.drawn_by == 0).any():
        raise ScoreTableError(
            "the paper's estimator needs samples of the reference, and the policies drew all of this table; use the "
            "balanced estimator, or sample with samples.proposals: all."
        )
    return "balanced" if wanted == "balanced" and scores.drawn_by.any() else "paper"
