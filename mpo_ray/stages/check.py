"""`mpo-ray check`: everything that would stop a run later, found before anything is paid for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from mpo_ray.cluster.preflight import check_engine, check_placement, check_storage_everywhere
from mpo_ray.config import ConfigError, RunConfig
from mpo_ray.data.lengths import TableLengths, lengths_table
from mpo_ray.data.problems import DataProblemsError
from mpo_ray.evaluation.rewards import IMPLICIT, is_callable_spec, load_reward
from mpo_ray.policies.given import check_comparable, find_policy
from mpo_ray.policies.loading import check_model_files, load_tokenizer
from mpo_ray.policies.weight_files import check_weight_files
from mpo_ray.run import Run
from mpo_ray.stages.check_estimate import Estimates, estimate_run
from mpo_ray.stages.check_model import check_reference
from mpo_ray.stages.data import LENGTHS, prepare_data, write_embedded
from mpo_ray.stages.judging import check_judge
from mpo_ray.stages.stage import EMBEDDED, Context


@dataclass
class Findings:
    """What was looked at, and what is wrong with it."""

    passed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    conflict: Any = None
    lengths: list[TableLengths] = field(default_factory=list)
    estimates: Estimates | None = None

    @property
    def cautions(self) -> list[str]:
        """What may stop the run, by an estimate. It does not make `check` fail."""
        return [] if self.estimates is None else self.estimates.cautions()

    def as_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "problems": self.problems,
            "counts": self.counts,
            "conflict": self.conflict,
            "lengths": [table.as_json() for table in self.lengths],
            "estimates": None if self.estimates is None else self.estimates.as_json(),
            "cautions": self.cautions,
        }

    def as_text(self) -> str:
        tables = [lengths_table(self.lengths), ""] if self.lengths else []
        tables += [] if self.estimates is None else [self.estimates.as_text(), ""]
        lines = [
            *tables,
            *(f"ok       {what}" for what in self.passed),
            *(f"caution  {what}" for what in self.cautions),
            *(f"problem  {what}" for what in self.problems),
        ]
        verdict = f"{len(self.problems)} problem(s)" if self.problems else "nothing would stop this run"
        return "\n".join([*lines, verdict])


def check_run(config: RunConfig, console: Console, *, update: bool = False, timing: bool = True) -> Findings:
    """Look at everything from the storage to the data; a problem in one does not hide the others.

    Where model and data are sound, say what the run will take. timing: whether to time some batches for that
    """
    findings, known = Findings(), set[str]()

    def look(what: str, at: Callable[[], object]) -> bool:
        """Whether it was sound."""
        try:
            found = at()
        except (ValueError, OSError) as error:
            each = error.problems if isinstance(error, DataProblemsError) else (str(error),)
            new = [problem for problem in each if problem not in known]
            known.update(new)
            findings.problems += [f"{what}: {problem}" for problem in new]
            return False
        findings.passed.append(f"{what}: {found}" if isinstance(found, str) else what)
        return True

    run = Run(config.storage, config.name)
    look("run name and storage", lambda: Run.check(config, update=update))
    look("storage from every node", lambda: check_storage_everywhere(run))
    look("scoring engine", lambda: check_run_engine(config))
    look("resources", lambda: check_placement(config))
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(config, Run(scratch, config.name), console)
        if context.uses_embedded():
            write_embedded(context)
        sound = look("reference model", lambda: check_model(context))
        sound &= look("weights of the reference", lambda: check_weights(context))
        look("models to compare", lambda: check_compared_models(context))
        look("rewards", lambda: check_rewards(context))
        if config.evaluation.judge is not None:
            look("judge", lambda: check_judge(context))
        sound &= look("data", lambda: findings.counts.update(prepare_data(context)))
        findings.conflict = context.run.read_json("comparisons/conflict.json")
        findings.lengths = [TableLengths.from_json(table) for table in context.run.read_json(LENGTHS) or []]
        if sound:
            findings.estimates = estimate_run(context, findings.counts, findings.lengths, timing=timing)
    return findings


def check_run_engine(config: RunConfig) -> str | None:
    """Refuse an engine that is not installed, or that could not hold the run's policies. Raises ConfigError.

    Returns what a user should know of it.
    """
    check_engine(config.scoring.engine, where="scoring.engine")
    if config.scoring.engine == "mpo":
        return None
    model = config.reference.model
    trained_here = config.reference.sft is not None or model == EMBEDDED
    if not trained_here and config.policies.lora is not None and not Path(model).is_dir():
        raise ConfigError(
            f"scoring.engine: vllm needs the reference of LoRA policies as a directory, not as {model!r}. Name a "
            "directory in reference.model, or set engine: mpo."
        )
    return "vllm; the times and the memory that are told are those of engine: mpo"


def check_model(context: Context) -> str | None:
    """Refuse a reference that this run could not train, mix and decode; says how it is decoded. Raises ModelError."""
    if context.config.reference.model == EMBEDDED and not context.run.exists(f"{EMBEDDED}/model"):
        return None
    return check_reference(context.given_model(), context.config)


def check_weights(context: Context) -> None:
    """Refuse a reference on this machine whose files are missing, damaged or not finite. Raises ModelError."""
    if context.config.reference.model != EMBEDDED and Path(context.given_model()).is_dir():
        check_weight_files(Path(context.given_model()))


def check_compared_models(context: Context) -> str | None:
    """Refuse a model of `evaluation.models` that could not be compared with the reference. Raises ModelError.

    Returns what a user should know of the others, or None.
    """
    cautions = []
    for name, path in context.compared_models().items():
        find_policy(path)
        if context.config.reference.model != EMBEDDED or context.run.exists(f"{EMBEDDED}/model"):
            cautions.append(check_comparable(name, path, context.given_model()))
    return " ".join(caution for caution in cautions if caution is not None) or None


def check_rewards(context: Context) -> None:
    """Refuse a reward that could not be imported or opened, long before scoring needs it."""
    for name, spec in context.rewards().items():
        if is_callable_spec(spec):
            load_reward(spec, objective=name)
        elif spec != IMPLICIT:
            check_model_files(spec)
            load_tokenizer(spec)
