"""The whole path, in order: which stages a run has, and how one of them, or all, are done."""

from __future__ import annotations

from mpo_ray.stages.constrained import CERTIFICATES, MOPO, POOLS
from mpo_ray.stages.data import DATA_STAGE, EMBEDDED_STAGE
from mpo_ray.stages.evaluating import EVALUATION, REPORT
from mpo_ray.stages.fitting import FIT, MIXTURE
from mpo_ray.stages.judging import JUDGE
from mpo_ray.stages.sampling import SAMPLES, SCORES
from mpo_ray.stages.stage import STAGES, Context, Stage, run_stage
from mpo_ray.stages.training import PAIRS, POLICIES, REFERENCE
from mpo_ray.storage import RunError

ORDER = (
    EMBEDDED_STAGE,
    DATA_STAGE,
    REFERENCE,
    PAIRS,
    POLICIES,
    SAMPLES,
    SCORES,
    FIT,
    MIXTURE,
    POOLS,
    MOPO,
    EVALUATION,
    CERTIFICATES,
    JUDGE,
    REPORT,
)
STAGES.update({stage.name: stage for stage in ORDER})


def stages_of(context: Context) -> list[Stage]:
    """The stages this run needs: embedded world, training of the reference and judge only where they are asked for."""
    left_out = set()
    if not context.uses_embedded():
        left_out.add(EMBEDDED_STAGE.name)
    if context.config.reference.sft is None:
        left_out.add(REFERENCE.name)
    if context.config.mopo is None:
        left_out |= {POOLS.name, MOPO.name, CERTIFICATES.name}
    if context.config.evaluation.judge is None:
        left_out.add(JUDGE.name)
    return [stage for stage in ORDER if stage.name not in left_out]


def run_pipeline(context: Context) -> None:
    """Do every stage that is not complete."""
    _tell_of_the_manifest(context)
    for stage in stages_of(context):
        run_stage(context, stage)


def run_single(context: Context, *names: str) -> str:
    """Do those stages of these names that the run has, and return the last one's; those before must be complete.

    Raises RunError that says which is not.
    """
    wanted = [stage for stage in stages_of(context) if stage.name in names]
    if not wanted:
        missing = "section `mopo`" if names[0] == POOLS.name else "reference.sft; the reference is used as it is"
        raise RunError(f"this config has no stage {names[0]!r}: it has no {missing}.")
    needed = {name for stage in wanted for name in _before(stage)} - set(names)
    _tell_of_the_manifest(context)
    for stage in stages_of(context):
        if stage.name not in needed:
            continue
        found = context.run.finished(stage.name, context.inputs(stage))
        if found is None or found.damaged:
            broken = "" if found is None else "".join(f" {node} {what}." for node, what in found.damaged.items())
            raise RunError(
                f"{context.run.root}: stage {wanted[0].name!r} needs {stage.name!r}, which is not complete for this "
                f"config.{broken} Run it first, or let `mpo-ray run` do every stage that is missing."
            )
    for stage in wanted:
        run_stage(context, stage)
    return wanted[-1].name


def _tell_of_the_manifest(context: Context) -> None:
    problem = context.run.manifest_problem()
    if problem is not None:
        context.console.print(f"{problem} Every stage looks for what is there from the same inputs.", markup=False)


def _before(stage: Stage) -> set[str]:
    return {stage.name for name in stage.after for stage in [STAGES[name]]} | {
        earlier for name in stage.after for earlier in _before(STAGES[name])
    }
