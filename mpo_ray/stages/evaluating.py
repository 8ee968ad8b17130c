"""The last stages: completions of every candidate on held-out prompts, what they are worth, and the report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from mpo_ray.cluster.evaluate import CandidateEvaluator
from mpo_ray.cluster.parts import Part, process_parts
from mpo_ray.data.scores import scores_from_table
from mpo_ray.evaluation.metrics import MPO, UNIFORM, Metrics, evaluate_completions
from mpo_ray.evaluation.report import write_report
from mpo_ray.evaluation.terminal import print_summary
from mpo_ray.fitting.trade_off import predict_trade_off
from mpo_ray.records import REFERENCE, digest
from mpo_ray.stages.stage import Context, Stage, content
from mpo_ray.stages.training import ACTOR_PLACEMENT


def candidates(objectives: list[str], fitted: dict[str, float]) -> dict[str, list[float] | None]:
    """Every candidate's weights λ in the order of the objectives; None for the reference."""
    vertices = {name: [1.0 if other == name else 0.0 for other in objectives] for name in objectives}
    uniform = [1 / len(objectives)] * len(objectives)
    return {REFERENCE: None, **vertices, UNIFORM: uniform, MPO: [fitted[name] for name in objectives]}


def evaluate(context: Context) -> dict[str, Any]:
    """Completions, rewards and KL of every candidate, then win rates and intervals."""
    config, run = context.config, context.run
    objectives = list(config.objectives)
    prompts = run.parts("prompts/evaluation")
    parts = [
        Part(
            source,
            f"evaluation/parts/{name}-{index:05d}.parquet",
            context.inputs(EVALUATION),
            {"candidate": name, "weights": weights, "seed": int(digest([config.seed, name, index])[:12], 16)},
        )
        for name, weights in candidates(objectives, run.read_json("fit.json")["weights"]).items()
        for index, source in enumerate(prompts)
    ]
    evaluation = config.evaluation
    process_parts(
        run,
        parts,
        CandidateEvaluator,
        {
            "artefact": str(run.fetch("mixture")),
            "reference": context.reference(),
            "policies": context.policies(),
            "rewards": context.rewards(),
            "beta": config.policies.beta,
            "actors": config.scoring.model_dump(),
            "num_completions": evaluation.completions_per_prompt,
            "max_new_tokens": evaluation.max_new_tokens,
            "temperature": evaluation.temperature,
        },
        actors=config.scoring,
        console=context.console,
        title="completions",
    )
    table = pa.concat_tables(run.read_table(part.target) for part in parts)
    metrics = evaluate_completions(
        table,
        objectives,
        draws=evaluation.bootstrap_draws,
        confidence=evaluation.confidence,
        seed=config.seed,
    )
    run.write_table("evaluation/completions.parquet", table)
    run.write_json("evaluation/metrics.json", metrics.as_json())
    return {name: c.minimum_win_rate.value for name, c in metrics.candidates.items()}


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
        )


def predictions(context: Context) -> dict[str, Any]:
    """What the scored samples predict of every candidate that is a mixture with known weights."""
    config, run = context.config, context.run
    objectives, fit = list(config.objectives), run.read_json("fit.json")
    weights = {name: w for name, w in candidates(objectives, fit["weights"]).items() if w is not None}
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
        context.config.evaluation.model_dump(exclude={"prompts", "num_prompts", "judge"}),
        context.config.scoring.model_dump(exclude=ACTOR_PLACEMENT),
        {name: content(spec) for name, spec in context.rewards().items()},
        context.config.seed,
    ],
    work=evaluate,
)
REPORT = Stage(
    name="report",
    title="Report",
    after=("judge",),
    outputs=lambda context: ["report"],
    depends_on=lambda context: None,
    work=report,
)
