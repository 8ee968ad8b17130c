"""MOPO's stages (design 2.4): the pool and its optimum for every problem of the run file, and the policies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mpo_ray.config import Mopo
from mpo_ray.data.candidate_pools import ERROR, pool_of_labels, pool_of_scores
from mpo_ray.data.pools import LOG_REF, WIN, pool_from_table
from mpo_ray.data.prompts import is_heldout
from mpo_ray.data.score_files import PROMPT
from mpo_ray.data.sources import DataError
from mpo_ray.evaluation.certificate import NOT_MET, certificate_lines, certify
from mpo_ray.fitting.pool_solution import pool_summary, solve_pool, values_under
from mpo_ray.fitting.summary import caution
from mpo_ray.maths.win_probability import LINKS
from mpo_ray.records import MOPO_PREFIX, Bound, digest
from mpo_ray.stages.stage import Context, Stage
from mpo_ray.stages.training import PLACEMENT, clear_checkpoints, figures_of, train_jobs, training_job
from mpo_ray.training.constrained import Problem

POOL = "mopo/pool.parquet"
#: What to do about a policy that was cloned, and misses a bound.
SHORT = (
    "the policy misses a bound that ρ meets on the pool: what is cloned moves only part of the way there. Train it "
    "with `method: online, values_of: policy`, where λ answers the policy; or for more epochs, or on more candidates."
)


def solve(context: Context) -> dict[str, Any]:
    """Build the pool, solve every problem on its training prompts, and write what the policies learn from."""
    mopo = _settings(context)
    pool = _pool(context, mopo)
    context.run.write_table(POOL, pool)
    names = [name.removeprefix(WIN) for name in pool.column_names if name.startswith(WIN)]
    errors = {name: float(np.sqrt(np.square(pool[ERROR + name].to_numpy()).mean())) for name in names}
    share, seed = mopo.heldout_share, context.config.seed
    # Another hash than that of data.heldout_share, which no prompt of the fit has on its held-out side.
    kept = pa.array([is_heldout(f"pool {prompt}", share=share, seed=seed) for prompt in pool[PROMPT].to_pylist()])
    sides = {"train": pool.filter(pc.invert(kept)), "heldout": pool.filter(kept)}
    for side, rows in sides.items():
        if not rows.num_rows:
            raise DataError(
                f"mopo: none of the pool's {len(kept)} candidates has a prompt for the {side} side; draw for more "
                f"prompts (samples.num_prompts), or change mopo.heldout_share, which is {mopo.heldout_share:g}."
            )
    found = {}
    for name in mopo.problems:
        result = _solve_one(context, mopo, name, sides)
        result["pool_errors"] = {o: errors[o] for o in (result["primary"], *result["bounds"])}
        context.run.write_json(f"mopo/{name}/mopo.json", result)
        context.console.print(f"mopo/{name}")
        context.console.print(pool_summary(result))
        found[name] = {"multipliers": result["multipliers"], "values": result["values"]}
    return found


def train(context: Context) -> dict[str, Any]:
    """Train one policy per problem, unless it was trained from the same candidates, reference and settings."""
    mopo = _settings(context)
    jobs = []
    for name in mopo.problems:
        solved = context.run.read_json(f"mopo/{name}/mopo.json")
        problem = Problem(
            primary=solved["primary"],
            secondary=list(solved["bounds"]),
            bounds=list(solved["bounds"].values()),
            adaptive=[bound.adaptive for bound in _bounds(mopo, name).values()],
            tau=mopo.tau,
            radius=mopo.radius,
            variant=mopo.variant,
            sigma=mopo.sigma,
        )
        jobs.append(
            training_job(
                context,
                f"mopo-{name}",
                (context.reference(), context.reference_inputs()),
                mopo.training_of(name),
                f"mopo/{name}/candidates",
                f"mopo/{name}/policy",
                section=f"mopo{'' if mopo.problems[name].training is None else f'.problems.{name}'}.training",
                problem=problem,
            )
        )
    train_jobs(context, jobs)
    return {name: figures_of(context, f"mopo/{name}/policy") for name in mopo.problems}


def _settings(context: Context) -> Mopo:
    mopo = context.config.mopo
    assert mopo is not None
    return mopo


def _bounds(mopo: Mopo, name: str) -> dict[str, Bound]:
    return {objective: Bound.parse(objective, text) for objective, text in mopo.problems[name].bounds.items()}


def _pool(context: Context, mopo: Mopo) -> pa.Table:
    config, objectives = context.config, list(context.config.objectives)
    if mopo.wins == "labels":
        used = dict.fromkeys(o for p in mopo.problems.values() for o in (p.primary, *p.bounds))
        return pool_of_labels({name: _pairs(context, name) for name in used})
    column, scale = ("log_ratio_", config.policies.beta) if mopo.wins == "implicit" else ("reward_", 1.0)
    return pool_of_scores(
        context.run.read_table("scores"),
        objectives,
        candidates=mopo.candidates,
        rewards={name: column + name for name in objectives},
        scale=scale,
        link=LINKS[mopo.link],
    )


def _pairs(context: Context, objective: str) -> pa.Table:
    """The objective's training pairs as token ids."""
    parts = [p for p in context.run.parts(f"reference_logprobs/{objective}") if "/train-" in p]
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    return pa.concat_tables(context.run.read_table(part, columns) for part in parts)


def _solve_one(context: Context, mopo: Mopo, name: str, sides: dict[str, pa.Table]) -> dict[str, Any]:
    """The optimum on the training prompts, and what its λ and τ give on the held-out ones."""
    problem, bounds = mopo.problems[name], _bounds(mopo, name)
    tables = {side: pool_from_table(rows, problem.primary, list(bounds)) for side, rows in sides.items()}
    try:
        result, ratio = solve_pool(
            tables["train"], bounds, tau=mopo.tau, radius=mopo.radius, variant=mopo.variant, sigma=mopo.sigma
        )
    except ValueError as error:
        raise DataError(f"mopo.problems.{name}: {error}") from error
    multipliers = np.array(list(result["multipliers"].values()))
    result["heldout_values"], heldout_ratio = values_under(tables["heldout"], multipliers, mopo.tau)
    for side, rho in {"train": ratio, "heldout": heldout_ratio}.items():
        rows = pa.Table.from_pylist(list(_candidates(sides[side], rho, problem.primary, list(bounds))))
        node = f"mopo/{name}/candidates/{side}-00000.parquet"
        context.run.write_table(node, rows, inputs=digest(rows.to_pylist()))
    return result


def _candidates(rows: pa.Table, ratio: Any, primary: str, secondary: list[str]) -> Iterator[dict[str, Any]]:
    """One row per prompt, with all its candidates: what training reads."""
    rows = rows.append_column("ratio", pa.array(ratio))
    lists = {
        "response_ids": rows["response_ids"].to_pylist(),
        "log_reference": rows[LOG_REF].to_pylist(),
        "primary": rows[WIN + primary].to_pylist(),
        "secondary": np.stack([rows[WIN + name].to_numpy() for name in secondary], axis=1).tolist()
        if secondary
        else [[]] * rows.num_rows,
        "ratio": rows["ratio"].to_pylist(),
    }
    prompts, ids = rows[PROMPT].to_pylist(), rows["prompt_ids"].to_pylist()
    starts = [i for i in range(len(prompts)) if i == 0 or prompts[i] != prompts[i - 1]]
    for first, last in zip(starts, [*starts[1:], len(prompts)], strict=True):
        own = {name: values[first:last] for name, values in lists.items()}
        yield {PROMPT: prompts[first], "prompt_ids": ids[first], **own}


def certify_policies(context: Context) -> dict[str, Any]:
    """Say of every bound whether it holds for the policy's own completions of the evaluation's prompts."""
    mopo, evaluation = _settings(context), context.config.evaluation
    completions = context.run.read_table("evaluation/completions.parquet")
    verdicts = {}
    for name, problem in mopo.problems.items():
        certificate = certify(
            completions,
            f"{MOPO_PREFIX}{name}",
            problem.primary,
            _certified_bounds(context, name),
            link=LINKS[mopo.link],
            draws=evaluation.bootstrap_draws,
            confidence=evaluation.confidence,
            seed=context.config.seed,
        )
        context.run.write_json(f"mopo/{name}/certificate.json", certificate)
        for line in certificate_lines(name, certificate):
            context.console.print(f"  {line}")
        verdicts[name] = {objective: found["verdict"] for objective, found in certificate["bounds"].items()}
        if NOT_MET in verdicts[name].values() and mopo.training_of(name).values_of == "ratio":
            context.console.print(caution(f"{name}: {SHORT}"))
    return verdicts


def _certified_bounds(context: Context, name: str) -> dict[str, float]:
    """What a policy has to reach: a relative bound is that far from ½, an adaptive one is where training left it."""
    bounds = _bounds(_settings(context), name)
    left = last_figures(context, name, "bound")
    return {objective: left[objective] if bound.adaptive else bound.at(0.5) for objective, bound in bounds.items()}


def last_figures(context: Context, name: str, quantity: str) -> dict[str, float]:
    """Bounded objective → the last that a problem's training reported of a quantity; empty where it reported none."""
    history = context.run.read_json(f"mopo/{name}/policy/training.json")["history"]
    keys = {objective: f"{quantity}_{objective}" for objective in _settings(context).problems[name].bounds}
    return {o: float(entry[key]) for entry in history for o, key in keys.items() if key in entry}


POOLS = Stage(
    name="pool",
    title="MOPO's pool and its optimum",
    after=("scores",),
    outputs=lambda context: [POOL, *(f"mopo/{name}/mopo.json" for name in _settings(context).problems)],
    depends_on=lambda context: [
        context.config.mopo
        and context.config.mopo.model_dump(exclude={"training": True, "problems": {"__all__": {"training"}}}),
        context.config.seed,
    ],
    work=solve,
)
MOPO = Stage(
    name="mopo",
    title="MOPO's policies",
    after=("pool",),
    outputs=lambda context: [f"mopo/{name}/policy" for name in _settings(context).problems],
    depends_on=lambda context: (
        context.config.mopo
        and {n: context.config.mopo.training_of(n).model_dump(exclude=PLACEMENT) for n in context.config.mopo.problems}
    ),
    work=train,
    clear=lambda context: clear_checkpoints(
        context, {f"mopo-{name}": f"mopo/{name}/policy" for name in _settings(context).problems}
    ),
)
CERTIFICATES = Stage(
    name="certificates",
    title="MOPO's certificates",
    after=("mopo", "evaluation"),
    outputs=lambda context: [f"mopo/{name}/certificate.json" for name in _settings(context).problems],
    depends_on=lambda context: None,
    work=certify_policies,
)
