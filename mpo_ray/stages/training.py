"""The stages that train: the reference (SFT), the pairs' reference log-probabilities, and one policy per objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpo_ray.cluster.checkpoints import remove_checkpoints
from mpo_ray.cluster.engines import actor_device
from mpo_ray.cluster.parts import Part, process_parts
from mpo_ray.cluster.score import PairReference
from mpo_ray.cluster.train import train_all
from mpo_ray.cluster.training_job import TrainingJob, checkpoint_directory
from mpo_ray.config_training import Training
from mpo_ray.policies.precision import AUTO
from mpo_ray.run import Run, file_digest, stage_inputs
from mpo_ray.stages.stage import Context, Stage
from mpo_ray.storage import RunError
from mpo_ray.training.constrained import Problem

#: What says where and how fast work is done, and not what comes out.
PLACEMENT = {"workers": {"cpus_per_worker", "gpus_per_worker", "max_failures"}}
ACTOR_PLACEMENT = {"num_actors", "cpus_per_actor", "gpus_per_actor", "batch_size", "engine", "vllm", "kv_cache_gib"}


def actor_settings(context: Context) -> dict[str, Any]:
    """What a stage of actors depends on of `scoring`: the device as well, where that decides over the precision."""
    scoring = context.config.scoring
    settings = scoring.model_dump(exclude=ACTOR_PLACEMENT)
    return {**settings, "device": actor_device(scoring)} if scoring.precision == AUTO else settings


def train_reference(context: Context) -> dict[str, Any]:
    """Fine-tune the given model on the texts: π_ref of everything that follows."""
    sft = context.config.reference.sft
    assert sft is not None
    model = context.given_model(), context.given_content()
    job = training_job(context, "base", model, sft, "texts", "base", section="reference.sft")
    train_jobs(context, [job])
    return figures_of(context, "base")


def score_pairs(context: Context) -> None:
    """log π_ref of both completions of every pair, and their token ids, in one pass of Ray Data."""
    run, reference = context.run, context.reference_inputs()
    parts = [
        Part(
            source,
            f"reference_logprobs/{name}/{source.rpartition('/')[2]}",
            stage_inputs("pairs", run.inputs_of(source), reference, context.scoring().precision),
        )
        for name in context.config.objectives
        for source in run.parts(f"comparisons/{name}")
    ]
    process_parts(
        context.run,
        parts,
        PairReference,
        {
            "reference": context.reference(),
            "actors": context.scoring().model_dump(),
            "rendering": context.config.data.rendering,
        },
        actors=context.scoring(),
        console=context.console,
        title="reference log-probabilities",
    )


def train_policies(context: Context) -> dict[str, Any]:
    """One policy per objective by DPO or IPO, unless it was trained from the same pairs, reference and settings."""
    model = context.reference(), context.reference_inputs()
    settings = context.config.policies
    jobs = [
        training_job(
            context, name, model, settings, f"reference_logprobs/{name}", f"policies/{name}", section="policies"
        )
        for name in context.config.objectives
    ]
    train_jobs(context, jobs)
    return {name: figures_of(context, f"policies/{name}") for name in context.config.objectives}


def train_jobs(context: Context, jobs: list[TrainingJob]) -> None:
    """Do the jobs whose output does not record that it was trained from the same inputs."""
    missing = []
    for job in jobs:
        if is_trained(context.run, job):
            context.console.print(f"[dim]  {job.output}: trained from the same inputs; kept[/dim]")
        else:
            missing.append(job)
    if missing:
        train_all(missing, context.console)


def is_trained(run: Run, job: TrainingJob) -> bool:
    """Whether the job's output was trained from the same inputs, and its files are those that training.json names.

    Sizes are compared everywhere; contents, by their SHA-256, where the run is on a file system.
    """
    try:
        recorded = run.read_json(f"{job.output}/training.json")
    except RunError:
        return False  # damaged; what it vouched for is trained again
    if recorded is None or recorded.get("inputs") != job.inputs:
        return False
    there = run.files(job.output)
    for name, (size, sha) in recorded.get("files", {}).items():
        node = f"{job.output}/{name}"
        if node not in there or there[node].size != size:
            return False
        if run.is_local and file_digest(str(run.local / node)) != sha:
            return False
    return True


def training_job(
    context: Context,
    name: str,
    model: tuple[str, str],
    training: Training,
    data: str,
    output: str,
    *,
    section: str,
    problem: Problem | None = None,
) -> TrainingJob:
    """model: where it lies, and what stands for it in a digest of inputs; section: of the run file, with the settings;
    problem: what MOPO's policy is to solve.
    """
    parts = context.run.parts(data)
    data_inputs = [[part, context.run.inputs_of(part)] for part in parts]
    settings = training.model_dump(mode="json", exclude={**PLACEMENT, "source": True})  # the data speak for it
    solved = [] if problem is None else [problem.model_dump()]
    return TrainingJob(
        name=name,
        inputs=stage_inputs("training", model[1], settings, context.config.seed, data_inputs, *solved),
        run_root=context.run.root,
        model=model[0],
        training=training,
        train_parts=[part for part in parts if part.rpartition("/")[2].startswith("train")],
        heldout_parts=[part for part in parts if part.rpartition("/")[2].startswith("heldout")],
        output=output,
        seed=context.config.seed,
        section=section,
        problem=problem,
    )


def clear_checkpoints(context: Context, models: Mapping[str, str]) -> None:
    """Remove what trainings would have gone on from. models: name of a training → node of the model that it made"""
    for name, node in models.items():
        remove_checkpoints(context.run, checkpoint_directory(name, context.trained_from(node)))


def figures_of(context: Context, node: str) -> dict[str, Any]:
    record = context.run.read_json(f"{node}/training.json")
    figures = ", ".join(f"{key} {value:.4g}" for key, value in record["heldout"].items())
    context.console.print(f"  {node}: {record['steps']} steps; held-out {figures}")
    return {"steps": record["steps"], "heldout": record["heldout"]}


REFERENCE = Stage(
    name="reference",
    title="Reference model",
    after=("data",),
    outputs=lambda context: ["base"],
    depends_on=lambda context: (
        context.config.reference.sft and context.config.reference.sft.model_dump(exclude=PLACEMENT)
    ),
    work=train_reference,
    clear=lambda context: clear_checkpoints(context, {"base": "base"}),
)
PAIRS = Stage(
    name="pairs",
    title="Reference log-probabilities of the pairs",
    after=("reference",),
    outputs=lambda context: ["reference_logprobs"],
    depends_on=actor_settings,
    work=score_pairs,
)
POLICIES = Stage(
    name="policies",
    title="Policies",
    after=("pairs",),
    outputs=lambda context: [f"policies/{name}" for name in context.config.objectives],
    depends_on=lambda context: context.config.policies.model_dump(exclude=PLACEMENT),
    work=train_policies,
    clear=lambda context: clear_checkpoints(context, {name: f"policies/{name}" for name in context.config.objectives}),
)
