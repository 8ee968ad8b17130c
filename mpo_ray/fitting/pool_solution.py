"""MOPO's optimum on a pool of candidates: any table in, mopo.json and the ratio ρ of every row out (design 2.4)."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Group, RenderableType
from rich.text import Text

from mpo_ray.data.pools import PoolTable, open_pool
from mpo_ray.fitting.summary import caution, titled_table
from mpo_ray.fitting.table_fit import named
from mpo_ray.maths.constrained import RunawayError, Solution, check_temperature, ratio, solve_barrier, solve_lagrangian
from mpo_ray.maths.feasibility import check_feasible
from mpo_ray.maths.robust import check_radius
from mpo_ray.maths.simplex import Array
from mpo_ray.records import Bound
from mpo_ray.whole_files import write_file

Variant = Literal["lagrangian", "barrier"]

#: Below this share of a pool's candidates, ρ rests on few of them; a bound with less slack than this binds; the largest
#: residual of an optimum.
LEAST_SHARE, BINDS, SOLVED = 0.2, 1e-4, 1e-6
#: Strength of the barrier where none is given.
SIGMA = 0.01


def solve_file(
    paths: Sequence[str],
    out: Path,
    *,
    primary: str,
    bounds: Mapping[str, Bound],
    tau: float = 0.08,
    radius: float = 0.0,
    variant: Variant = "lagrangian",
    sigma: float | None = None,
) -> dict[str, Any]:
    """Solve the pool in `paths` and write mopo.json and ratio.parquet into `out`; returns what mopo.json holds.

    Raises ScoreTableError for a pool that cannot be used, ValueError for settings that make no problem, and
    InfeasibleBoundsError where no policy on the pool meets the bounds.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a directory, which is made if it is not there.")
    if primary in bounds:
        raise ValueError(
            f"the primary objective {primary!r} is maximised, and cannot be bounded as well; leave its --bound out, or "
            "make another objective the primary one."
        )
    for name, bound in bounds.items():
        if bound.adaptive:
            raise ValueError(
                f"bound {name}: an adaptive bound follows a training, and a table has none; give a number, or "
                "`reference - 0.02`."
            )
    if sigma is not None and variant != "barrier":
        raise ValueError(f"--sigma {sigma:g} is the strength of the barrier; give --variant barrier, or leave it out.")
    check_temperature(tau)
    check_radius(radius)
    table = open_pool(paths, primary, list(bounds))
    result, rho = solve_pool(
        table, bounds, tau=tau, radius=radius, variant=variant, sigma=SIGMA if sigma is None else sigma
    )
    write_file(out / "mopo.json", (json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())
    rows = {"prompt_id": table.prompt_ids, "response_id": table.response_ids, "ratio": pa.array(rho)}
    table_bytes = io.BytesIO()
    pq.write_table(pa.table(rows), table_bytes)
    write_file(out / "ratio.parquet", table_bytes.getvalue())
    return result


def solve_pool(
    table: PoolTable, bounds: Mapping[str, Bound], *, tau: float, radius: float, variant: Variant, sigma: float
) -> tuple[dict[str, Any], Array]:
    """The optimum, described, and ρ of every row. Feasibility is decided first."""
    pool, names = table.pool, list(bounds)
    reference = pool.expectation(pool.secondary)
    limits = np.array([bound.at(float(at)) for bound, at in zip(bounds.values(), reference, strict=True)])
    for name, limit in zip(names, limits, strict=True):
        if not 0.0 <= limit <= 1.0:
            raise ValueError(f"bound {name}: {limit:.4f}, from what the reference has, is outside [0, 1].")
    feasible = check_feasible(pool, limits, names)
    try:
        if variant == "barrier":
            found = solve_barrier(pool, limits, tau=tau, sigma=sigma, radius=radius)
        else:
            found = solve_lagrangian(pool, limits, tau=tau, radius=radius)
    except RunawayError as error:
        raise RunawayError(error.which, error.multiplier, names[error.which]) from None
    sizes = np.diff(pool.starts)
    result = {
        "variant": variant,
        "primary": table.objectives[0],
        "tau": tau,
        "radius": radius,
        "sigma": sigma if variant == "barrier" else None,
        "bounds": named(names, limits),
        "multipliers": named(names, found.multipliers),
        "chi": {name: chi if np.isfinite(chi) else None for name, chi in named(names, found.chi).items()},
        "values": {table.objectives[0]: found.primary, **named(names, found.secondary)},
        "robust_values": named(names, found.robust),
        "reference_values": {table.objectives[0]: float(pool.expectation(pool.primary)), **named(names, reference)},
        "best_values": named(names, feasible.best),
        "binding": [n for n, value, b in zip(names, found.robust, limits, strict=True) if value - b < BINDS],
        "correlation": named(names, _correlations(pool.primary, pool.secondary)),
        "kl": found.kl,
        "dual_value": found.dual_value,
        "residual": found.residual,
        "effective_sample_size": {
            "min": float(found.effective_sample_size.min()),
            "median": float(np.median(found.effective_sample_size)),
        },
        "num_prompts": pool.num_prompts,
        "num_candidates": len(pool.primary),
        "candidates_per_prompt": {"min": int(sizes.min()), "max": int(sizes.max())},
        "warnings": _warnings(names, found, limits, sizes),
    }
    return result, found.ratio


def values_under(table: PoolTable, multipliers: Array, tau: float) -> tuple[dict[str, float], Array]:
    """What ρ of these multipliers gives each objective on another pool, and ρ of every row   (eq. 9)"""
    pool = table.pool
    rho = ratio(pool, multipliers, tau)
    values = [float(pool.expectation(rho * pool.primary)), *pool.expectation(rho[:, None] * pool.secondary)]
    return dict(named(table.objectives, values)), rho


def pool_summary(result: Mapping[str, Any]) -> RenderableType:
    """What mopo.json holds, for the terminal."""
    radius = f", radius {result['radius']:g} nats" if result["radius"] else ""
    table = titled_table(f"win probabilities ({result['variant']}, τ = {result['tau']:g}{radius})")
    for column in ("", "reference", "best", "optimum", "robust", "bound", "multiplier λ", "binds"):
        table.add_column(column, justify="right" if column else "left")
    primary = result["primary"]
    values, reference = result["values"], result["reference_values"]
    table.add_row(f"{primary} (primary)", f"{reference[primary]:.3f}", "", f"{values[primary]:.3f}", "", "", "", "")
    for name, bound in result["bounds"].items():
        robust = f"{result['robust_values'][name]:.3f}" if result["radius"] else ""
        table.add_row(
            name,
            f"{reference[name]:.3f}",
            f"{result['best_values'][name]:.3f}",
            f"{values[name]:.3f}",
            robust,
            f"{bound:.3f}",
            f"{result['multipliers'][name]:.3f}",
            "yes" if name in result["binding"] else "",
        )
    size, counts = result["effective_sample_size"], result["candidates_per_prompt"]
    facts = (
        f"KL {result['kl']:.3f} nats, residual {result['residual']:.1e}; {result['num_prompts']} prompts of "
        f"{counts['min']} to {counts['max']} candidates; effective sample size: median {size['median']:.1f}, min "
        f"{size['min']:.1f}"
    )
    return Group(table, Text(facts), *(caution(text) for text in result["warnings"]))


def _correlations(primary: Array, secondary: Array) -> Array:
    """(J,) correlation of each secondary's win probability with the primary's over the pool; 0 if constant."""
    centred, others = primary - primary.mean(), secondary - secondary.mean(axis=0)
    norms = np.sqrt(np.square(centred).sum() * np.square(others).sum(axis=0))
    return np.asarray(np.divide(centred @ others, norms, out=np.zeros(secondary.shape[1]), where=norms > 0))


def _warnings(names: Sequence[str], found: Solution, limits: Array, sizes: Array) -> list[str]:
    texts = []
    share = float(np.median(found.effective_sample_size / sizes))
    if share < LEAST_SHARE:
        texts.append(
            f"ρ rests on {np.median(found.effective_sample_size):.1f} of {np.median(sizes):.0f} candidates per prompt "
            "(median): a policy trained on it learns single responses. Raise tau, lower the bounds or the radius, or "
            "give every prompt more candidates."
        )
    if found.residual > SOLVED:
        texts.append(
            f"The solver stopped with a residual of {found.residual:.1e}: the bounds hold to no more than that. Lower "
            "the radius, or raise tau."
        )
    if names and not found.multipliers.any():
        texts.append(
            "No bound binds: the objectives agree here, the multipliers are 0, and this is the primary objective alone."
        )
    return texts
