"""What a stage is: a name, what its output depends on, where it writes, and the work itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from mpo_ray.cluster.engines import actor_device
from mpo_ray.config import Data, RunConfig, Scoring
from mpo_ray.config_training import Source
from mpo_ray.data.sources import fingerprint
from mpo_ray.policies.loading import load_rendering
from mpo_ray.policies.precision import AUTO, resolve
from mpo_ray.records import MOPO_PREFIX
from mpo_ray.run import Run, directory_digest, file_digest, stage_inputs

EMBEDDED = "embedded"
#: What `precision: auto` is in a run, by reference and device.
PRECISION = "precision.json"


@dataclass
class Context:
    """One run as its stages see it. Results go to standard output, progress to `console`.

    recorded: whether what is done is entered in the manifest; not so while another command works on the run
    """

    config: RunConfig
    run: Run
    console: Console
    recorded: bool = True
    _digests: dict[str, str] = field(default_factory=dict)
    _given_content: str | None = None
    _rendered: list[Any] | None = None
    _scoring: Scoring | None = None

    def inputs(self, stage: Stage) -> str:
        """Digest of everything the stage's output depends on, the stages before it included."""
        if stage.name not in self._digests:
            before = [self.inputs(STAGES[name]) for name in stage.after]
            self._digests[stage.name] = stage_inputs(stage.name, stage.depends_on(self), before)
        return self._digests[stage.name]

    def resolve(self, source: Source) -> Source:
        """A source of the embedded world as the file that the run wrote for it; any other as it is."""
        if source.embedded is None:
            return source
        return Source(path=str(self.run.fetch(f"{EMBEDDED}/{source.embedded}.jsonl")), rename=source.rename)

    def reference(self) -> str:
        """Where π_ref lies: trained by the run, or given."""
        return str(self.run.fetch("base")) if self.config.reference.sft else self.given_model()

    def given_model(self) -> str:
        """The model that `reference.model` names, as an absolute directory or a hub id."""
        model = self.config.reference.model
        return str(self.run.fetch(f"{EMBEDDED}/model")) if model == EMBEDDED else absolute(model)

    def given_content(self) -> str:
        """What stands for `reference.model` in a digest of inputs."""
        if self._given_content is None:
            model = self.config.reference.model
            self._given_content = self.inputs(STAGES[EMBEDDED]) if model == EMBEDDED else content(model)
        return self._given_content

    def scoring(self) -> Scoring:
        """The settings of the actors with `precision: auto` decided, which every file that they make depends on.

        It is decided once for a reference and a device, on the driver's machine, and kept in the run: actors that each
        timed a product could differ, and so could a run that goes on later.
        """
        if self._scoring is None:
            self._scoring = self._decided(self.config.scoring)
        return self._scoring

    def _decided(self, settings: Scoring) -> Scoring:
        if settings.precision != AUTO:
            return settings
        decided = self.run.read_json(PRECISION) or {}
        key = f"{self.reference_inputs()} on {actor_device(settings)}"
        if key not in decided:
            decided[key] = resolve(AUTO, self.reference(), actor_device(settings))
            self.run.write_json(PRECISION, decided)
            self.console.print(f"  scoring.precision: auto is {decided[key]} in this run")
        return settings.model_copy(update={"precision": decided[key]})

    def reference_inputs(self) -> str:
        """What stands for π_ref in a digest of inputs: what it was trained from, or the given model.

        How prompts and replies become its token ids belongs to it, where that is not the plain way.
        """
        model = self.trained_from("base") if self.config.reference.sft else self.given_content()
        if self._rendered is None:
            settings = self.config.data.rendering
            rendering = load_rendering(self.given_model(), **settings)
            plain = rendering.ends == (rendering.tokenizer.eos_token_id,) and settings == Data().rendering
            self._rendered = [] if plain else [settings, rendering.ends]
        return stage_inputs("reference", model, self._rendered) if self._rendered else model

    def trained_from(self, node: str) -> str:
        """The digest of what the model at a node of the run was trained from."""
        return str(self.run.read_json(f"{node}/training.json")["inputs"])

    def policies(self) -> dict[str, str]:
        """Where every policy lies, by objective."""
        return {name: str(self.run.fetch(f"policies/{name}")) for name in self.config.objectives}

    def rewards(self) -> dict[str, str]:
        """Every objective's reward, with absolute paths."""
        return {name: absolute(objective.reward) for name, objective in self.config.objectives.items()}

    def compared_models(self) -> dict[str, str]:
        """Other people's models by name, with absolute paths."""
        return {name: absolute(path) for name, path in self.config.evaluation.models.items()}

    def mopo_policies(self) -> dict[str, str]:
        """Where MOPO's policies lie, by the names of their candidates."""
        problems = [] if self.config.mopo is None else self.config.mopo.problems
        return {f"{MOPO_PREFIX}{name}": str(self.run.fetch(f"mopo/{name}/policy")) for name in problems}

    def uses_embedded(self) -> bool:
        return self.config.reference.model == EMBEDDED or any(s.embedded for s in self.sources().values())

    def sources(self) -> dict[str, Source]:
        """Every source that the config names, by its place in the run file."""
        config = self.config
        found = {f"objectives.{name}.preferences": o.preferences for name, o in config.objectives.items()}
        sft = config.reference.sft
        optional = {
            "reference.sft.source": None if sft is None else sft.source,
            "samples.prompts": config.samples.prompts,
            "evaluation.prompts": config.evaluation.prompts,
        }
        return found | {place: source for place, source in optional.items() if source is not None}


@dataclass(frozen=True)
class Stage:
    """`work` makes `outputs` (nodes of the run) and returns figures worth keeping in the manifest.

    clear: removes what only unfinished work needs, once the outputs are recorded; also of an earlier command that was
        killed in between
    """

    name: str
    title: str
    after: tuple[str, ...]
    outputs: Callable[[Context], list[str]]
    depends_on: Callable[[Context], Any]
    work: Callable[[Context], Any]
    clear: Callable[[Context], None] = lambda _: None


#: Every stage by name, in the order of a whole run; filled by `mpo_ray.stages.pipeline`.
STAGES: dict[str, Stage] = {}


def run_stage(context: Context, stage: Stage) -> bool:
    """Do a stage unless its output is complete and its inputs are unchanged. Returns whether it was done."""
    run, inputs = context.run, context.inputs(stage)
    found = run.finished(stage.name, inputs)
    if found is not None and not found.damaged:
        context.console.print(f"[dim]{stage.title}: complete, inputs unchanged; skipped[/dim]")
        if context.recorded:
            if found.renewed:
                run.renew(stage.name, found)
            stage.clear(context)
        return False
    context.console.print(f"[bold]{stage.title}[/bold]")
    started = time.monotonic()
    if context.recorded:
        run.begin_stage(stage.name)
    if found is not None:
        for node, problem in found.damaged.items():
            context.console.print(f"  {node} {problem}: it is made again", markup=False, soft_wrap=True)
        run.discard(found)
    notes = stage.work(context)
    seconds = time.monotonic() - started
    if context.recorded:
        run.complete(stage.name, inputs, outputs=stage.outputs(context), seconds=seconds, notes=notes)
        stage.clear(context)
    context.console.print(f"[dim]  {seconds:.1f} s[/dim]")
    return True


def absolute(spec: str) -> str:
    """A path that exists as an absolute one (workers may have another working directory); anything else as it is."""
    path, colon, function = spec.rpartition(":")
    if colon and path.endswith(".py"):
        return f"{Path(path).absolute()}:{function}"
    return str(Path(spec).absolute()) if Path(spec).exists() else spec


def content(spec: str) -> str:
    """What stands for a model, reward or source in a stage's inputs: its content where it is here, else its name."""
    path = Path(spec.rpartition(":")[0] if spec.rpartition(":")[0].endswith(".py") else spec)
    if path.is_dir():
        return directory_digest(path)
    return f"{spec} {file_digest(str(path))}" if path.is_file() else spec


def source_content(source: Source) -> list[Any]:
    """A source's description and the digest of its content; the embedded world's content follows from the seed."""
    known = [] if source.embedded else [fingerprint(source)]
    return [source.model_dump(mode="json"), *known]
