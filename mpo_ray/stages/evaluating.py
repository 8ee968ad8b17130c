"""The last stages: completions of every candidate on held-out prompts, what they are worth, and the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mpo_ray.cluster.engines import can_draw, drawing_inputs
from mpo_ray.cluster.evaluate import CandidateEvaluator
from mpo_ray.cluster.parts import Part, process_parts
from mpo_ray.data.scores import scores_from_table
from mpo_ray.evaluation.candidates import Candidate, grid_candidates, named_candidates
from mpo_ray.evaluation.metrics import Metrics, evaluate_completions
from mpo_ray.evaluation.pareto import Pareto, compare_points, families_of
from mpo_ray.evaluation.report import write_report
from mpo_ray.evaluation.rewards import IMPLICIT
from mpo_ray.evaluation.terminal import print_summary
from mpo_ray.fitting.trade_off import predict_trade_off
from mpo_ray.records import digest
from mpo_ray.run import stage_inputs
from mpo_ray.stages.check import check_compared_models
from mpo_ray.stages.constrained import last_figures
from mpo_ray.stages.data import check_contexts
from mpo_ray.stages.sampling import sample_counts
from mpo_ray.stages.stage import Context, Stage, content
from mpo_ray.stages.training import actor_settings

PARTS = "evaluation/parts"


def evaluate(context: Context) -> dict[str, Any]:
    """Completions, rewards and KL of every candidate, then win rates, intervals and the front."""
    config, run = context.config, context.run
    check_compared_models(context)
    check_contexts(context)
    objectives, settings = list(config.objectives), config.evaluation
    named = named_candidates(
        objectives,
        run.read_json("fit.json"),
        settings,
        context.compared_models() | context.mopo_policies(),
        particles=config.decoding.particles,
    )
    grid = grid_candidates(len(objectives), settings, particles=config.decoding.particles)
    # A point of the grid that is a named candidate takes its completions; the others have the first prompts only.
    known = {candidate.distribution for candidate in named.values()}
    parts = {name: _parts(context, candidate) for name, candidate in named.items()}
    for name, candidate in grid.items():
        first = None if candidate.distribution in known else settings.grid_prompts
        parts[name] = _parts(context, candidate, first=first)
    _generate(context, list({part.target: part for own in parts.values() for part in own}.values()))
    table = _table(context, {name: parts[name] for name in named})
    metrics = evaluate_completions(
        table,
        objectives,
        **_resampling(context),
        particles=config.decoding.particles,
        rows_per_token={name: candidate.rows_per_token for name, candidate in named.items()},
    )
    run.write_table("evaluation/completions.parquet", table)
    points = table
    if grid:
        points = pa.concat_tables([table, _table(context, {name: parts[name] for name in grid})])
        points = points.filter(pc.is_in(points["prompt_id"], pa.array(_first_prompts(context))))
        run.write_table("evaluation/grid.parquet", points)
    if len(objectives) > 1:
        metrics = replace(metrics, pareto=_pareto(context, points, named, grid))
    run.write_json("evaluation/metrics.json", metrics.as_json())
    return {name: c.minimum_win_rate.value for name, c in metrics.candidates.items()}


def _parts(context: Context, candidate: Candidate, *, first: int | None = None) -> list[Part]:
    """One part for every file of prompts, or as many as hold the first ones; named by the candidate's distribution."""
    config, run = context.config, context.run
    same = candidate.distribution
    weights = {name: w for name, w in zip(config.objectives, same.weights or (), strict=False) if w > 0}
    identity = [same.kind, weights, same.path and content(same.path), *([same.particles] * (same.particles > 1))]
    made_from = [*_made_from(context), {name: context.trained_from(f"policies/{name}") for name in weights}]
    if can_draw(config.scoring, same):
        made_from += drawing_inputs(config.scoring)
    size, parts = config.scoring.prompts_per_part, []
    for index, source in enumerate(run.parts("prompts/evaluation")):
        num_prompts = size if first is None else min(size, first - index * size)
        if num_prompts <= 0:
            break
        values = {
            "candidate": same.as_json(),
            "seed": int(digest([config.seed, identity, index])[:12], 16),
            "num_prompts": num_prompts,
        }
        target = f"{PARTS}/{same.kind}-{digest([identity, num_prompts])[:12]}-{index:05d}.parquet"
        inputs = stage_inputs("completions", identity, values["seed"], num_prompts, run.inputs_of(source), made_from)
        parts.append(Part(source, target, inputs, values))
    return parts


def _made_from(context: Context) -> list[Any]:
    """What every completion and its columns depend on. Not who else is compared: others' completions are kept."""
    config = context.config
    sampling = config.evaluation.model_dump(include={"completions_per_prompt", "max_new_tokens", "temperature"})
    implicit = [context.trained_from(f"policies/{name}") for name in config.objectives]
    rewards = {
        name: [implicit, config.policies.beta] if spec == IMPLICIT else content(spec)
        for name, spec in context.rewards().items()
    }
    return [sampling, context.scoring().precision, rewards, context.reference_inputs()]


def _generate(context: Context, parts: list[Part]) -> None:
    config = context.config
    process_parts(
        context.run,
        parts,
        CandidateEvaluator,
        {
            "reference": context.reference(),
            "policies": context.policies(),
            "rewards": context.rewards(),
            "beta": config.policies.beta,
            "actors": context.scoring().model_dump(),
            "rendering": config.data.rendering,
            "num_completions": config.evaluation.completions_per_prompt,
            "max_new_tokens": config.evaluation.max_new_tokens,
            "temperature": config.evaluation.temperature,
        },
        actors=context.scoring(),
        console=context.console,
        title="completions",
    )


def _table(context: Context, parts: Mapping[str, Iterable[Part]]) -> pa.Table:
    """The completions of every candidate, under its name."""
    tables = []
    for name, own in parts.items():
        table = pa.concat_tables(context.run.read_table(part.target) for part in own)
        tables.append(table.add_column(0, "candidate", pa.array([name] * table.num_rows)))
    return pa.concat_tables(tables)


def _first_prompts(context: Context) -> list[str]:
    ids = context.run.read_table("prompts/evaluation")["prompt_id"].to_pylist()
    return list(ids[: context.config.evaluation.grid_prompts])


def _pareto(context: Context, points: pa.Table, named: dict[str, Candidate], grid: dict[str, Candidate]) -> Pareto:
    objectives = list(context.config.objectives)
    families = families_of(objectives, named, grid)
    return compare_points(points, objectives, named | grid, families, **_resampling(context))


def _resampling(context: Context) -> dict[str, Any]:
    evaluation = context.config.evaluation
    return {"draws": evaluation.bootstrap_draws, "confidence": evaluation.confidence, "seed": context.config.seed}


def report(context: Context) -> None:
    """Write report.html and its pictures from what the other stages left."""
    run, config = context.run, context.config
    metrics = Metrics.from_json(run.read_json("evaluation/metrics.json"))
    trained = {name: run.read_json(f"policies/{name}/training.json") for name in config.objectives}
    with run.publishing("report") as directory:
        write_report(
            directory,
            run_name=run.name,
            metrics=metrics,
            fit=run.read_json("fit.json"),
            trade_off=run.read_json("trade_off.json"),
            predicted=predictions(context),
            completions=run.read_table("evaluation/completions.parquet"),
            counts=run.read_json("comparisons/counts.json"),
            conflict=run.read_json("comparisons/conflict.json"),
            provenance={
                "seed": config.seed,
                "config": config.digest[:12],
                **{f"version of {name}": v for name, v in run.manifest().get("versions", {}).items()},
            },
            training=trained,
            judge=run.read_json("evaluation/judge.json") if config.evaluation.judge else None,
            mopo=_mopo(context),
            samples=sample_counts(run),
        )


def _mopo(context: Context) -> dict[str, Any] | None:
    if context.config.mopo is None:
        return None
    names, read = list(context.config.mopo.problems), context.run.read_json
    return {
        "solved": {name: read(f"mopo/{name}/mopo.json") for name in names},
        "trained": {name: last_figures(context, name, "multiplier") for name in names},
        "certificates": {name: read(f"mopo/{name}/certificate.json") for name in names},
    }


def predictions(context: Context) -> dict[str, Any]:
    """What the scored samples predict of every candidate that is a mixture with known weights."""
    config, run = context.config, context.run
    objectives, fit = list(config.objectives), run.read_json("fit.json")
    named = named_candidates(objectives, fit, config.evaluation, {}, particles=config.decoding.particles)
    weights = {name: candidate.weights for name, candidate in named.items() if candidate.kind == "mixture"}
    predicted = predict_trade_off(
        scores_from_table(run.read_table("scores"), objectives, min_objectives=1),
        np.array(list(weights.values())),
        estimator=fit["estimator"],
        draws=config.fit.bootstrap_draws,
        confidence=config.fit.confidence,
        seed=config.seed,
    )
    return dict(zip(weights, predicted["points"], strict=True))


def show_summary(context: Context) -> None:
    """Print the table of candidates and where the report lies."""
    metrics = Metrics.from_json(context.run.read_json("evaluation/metrics.json"))
    print_summary(metrics, context.run.read_json("fit.json"))
    print(f"report: {context.run.root}/report/report.html")


EVALUATION = Stage(
    name="evaluation",
    title="Evaluation",
    after=("mixture",),
    outputs=lambda context: ["evaluation/completions.parquet", "evaluation/metrics.json"],
    depends_on=lambda context: [
        context.config.evaluation.model_dump(exclude={"prompts", "num_prompts", "models", "judge"}),
        {name: content(path) for name, path in (context.compared_models() | context.mopo_policies()).items()},
        actor_settings(context),
        context.config.decoding.model_dump(),
        {name: content(spec) for name, spec in context.rewards().items()},
        context.config.seed,
        *drawing_inputs(context.config.scoring),
    ],
    work=evaluate,
)
REPORT = Stage(
    name="report",
    title="Report",
    after=("certificates", "judge"),
    outputs=lambda context: ["report"],
    depends_on=lambda context: None,
    work=report,
)
