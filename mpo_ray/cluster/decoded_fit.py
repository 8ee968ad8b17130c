"""The decoded fit on Ray (design 2.2, eq. 6b): every step decodes the mixture with the λ that it is at.

A step is some files below `fit/decoded`, each made from λ_t, its prompts, its seed and the models. λ_t follows from the
earlier files alone, so a fit that was broken off goes on where it was and repeats nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from mpo_ray.cluster.crew import Crew, Task
from mpo_ray.cluster.mixture_decoder import MixtureDecoder
from mpo_ray.cluster.progress import bars
from mpo_ray.config import DecodedSteps, RunConfig
from mpo_ray.data.sources import DataError
from mpo_ray.evaluation.gains import Gains
from mpo_ray.evaluation.rewards import IMPLICIT
from mpo_ray.maths.decoded_game import Answer, Observations, answer, next_weights, weight_intervals
from mpo_ray.maths.simplex import Array
from mpo_ray.records import digest
from mpo_ray.run import Run, stage_inputs

STEPS = "fit/decoded"


@dataclass(frozen=True, slots=True)
class Step:
    """What one step decoded with, and what came of it: gains in the unit of `DecodedFit.gain`.

    log_z: mean over completions of log Ẑ, nats; with one particle Σ_t log Z_t, what token-level decoding dropped
    num_tokens: their mean length
    """

    weights: dict[str, float]
    gains: dict[str, float]
    standard_errors: dict[str, float]
    log_z: float
    num_tokens: float


@dataclass(frozen=True, slots=True)
class DecodedFit:
    """The answer of the game, with the gains that all its steps together suggest there.

    particles: that the steps decoded with (design 2.3)
    average: the plain average of the steps' λ, the paper's form; policies: each policy alone, from the score table
    intervals: λ's percentile intervals, none without draws
    """

    weights: dict[str, float]
    gain: str
    particles: int
    gains: dict[str, float]
    standard_errors: dict[str, float]
    average: dict[str, float]
    intervals: dict[str, list[float]] | None
    steps: list[Step] = field(default_factory=list)
    policies: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def play(
    run: Run,
    config: RunConfig,
    *,
    reference: str,
    policies: Mapping[str, str],
    rewards: Mapping[str, str],
    inputs: str,
    console: Console,
) -> DecodedFit:
    """Play the game of `config.fit.decoded` on the fit's prompts, against the reference's samples in the score table.

    reference, policies, rewards: where they lie, by objective; inputs: digest of what these and the prompts are
    Raises DataError where prompts or score table cannot serve, StageError where actors die for good.
    """
    settings, objectives = config.fit.decoded, list(policies)
    gains = Gains(run.read_table("scores"), objectives, settings.gain)
    alone = gains.of_policies()
    known = Observations.none(len(objectives))
    for name, (value, error) in alone.items():
        vertex = np.array([[float(other == name) for other in objectives]])
        known = known.and_also(Observations(vertex, value[None] / gains.unit, error[None] / gains.unit))
    seen, steps, wanted = Observations.none(len(objectives)), list[Step](), set[str]()
    prompts = _Rotation(run.read_table("prompts/fit"), settings.num_prompts, config.seed)
    crew = Crew(run, MixtureDecoder, _arguments(run, config, reference, policies, rewards), config.scoring)
    try:
        with bars(console) as shown:
            figures: dict[str, float] = {}
            for t in range(settings.steps):
                started = time.monotonic()
                weights = next_weights(seen, known, num_steps=settings.steps, step_scale=settings.step_scale)
                tasks = _tasks(config, inputs, t, weights, prompts.step(t))
                for done, _ in enumerate(crew.make(tasks)):
                    shown.show("decoded fit", t * len(tasks) + done, settings.steps * len(tasks), figures)
                wanted |= {task.target for task in tasks}
                table = pa.concat_tables(run.read_table(task.target) for task in tasks)
                value, error = gains.of(table)
                seen = seen.and_also(Observations(weights[None], value[None] / gains.unit, error[None] / gains.unit))
                steps.append(_step(objectives, weights, value, error, table))
                figures = {f"λ {n}": v for n, v in steps[-1].weights.items()}
                figures |= {f"gain {n}": v for n, v in steps[-1].gains.items()}
                shown.show("decoded fit", (t + 1) * len(tasks), settings.steps * len(tasks), figures)
                console.print(_line(t, steps[-1], time.monotonic() - started), style="dim", soft_wrap=True)
    finally:
        crew.dismiss()
    for left_over in set(run.parts(STEPS)) - wanted:
        run.remove(left_over)
    return _fit(config, objectives, answer(seen, known), gains.unit, steps, alone, _intervals(config, seen, known))


class _Rotation:
    """Which prompts a step takes: the next ones of a seeded order of all, so that all are used alike."""

    def __init__(self, prompts: pa.Table, num: int, seed: int) -> None:
        if prompts.num_rows < 2:
            raise DataError(
                f"prompts/fit holds {prompts.num_rows} prompt(s), and the decoded fit needs 2 or more to know the "
                "error of a gain; raise samples.num_prompts."
            )
        order = np.random.default_rng([seed, prompts.num_rows]).permutation(prompts.num_rows)
        self._prompts, self._num = prompts.take(order), min(num, prompts.num_rows)

    def step(self, t: int) -> pa.Table:
        return self._prompts.take((t * self._num + np.arange(self._num)) % self._prompts.num_rows)


def _arguments(
    run: Run, config: RunConfig, reference: str, policies: Mapping[str, str], rewards: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "reference": reference,
        "policies": dict(policies),
        "rewards": dict(rewards),
        "beta": config.policies.beta,
        "actors": config.scoring.model_dump(),
        "rendering": config.data.rendering,
        "num_completions": config.fit.decoded.completions_per_prompt,
        "max_new_tokens": config.samples.max_new_tokens,
        "particles": config.decoding.particles,
        "with_log_ratios": _needs_log_ratios(config.fit.decoded, rewards),
    }


def _needs_log_ratios(settings: DecodedSteps, rewards: Mapping[str, str]) -> bool:
    return settings.gain == "implicit" or IMPLICIT in rewards.values()


def _tasks(config: RunConfig, inputs: str, t: int, weights: Array, prompts: pa.Table) -> list[Task]:
    """The files of step t: `prompts_per_part` prompts in each, as everywhere in a run."""
    scoring, settings = config.scoring, config.fit.decoded
    drawing = [settings.completions_per_prompt, config.samples.max_new_tokens, config.decoding.particles]
    tasks = []
    for index, start in enumerate(range(0, prompts.num_rows, scoring.prompts_per_part)):
        part = prompts.slice(start, scoring.prompts_per_part)
        values = {
            "weights": weights.tolist(),
            "objectives": list(config.objectives),
            "seed": int(digest([config.seed, "decoded", t, index])[:12], 16),
        }
        made_from = stage_inputs(
            "decoded",
            inputs,
            values,
            part["prompt_id"].to_pylist(),
            [*drawing, scoring.precision, settings.gain],
        )
        tasks.append(Task(f"{STEPS}/step-{t:03d}-part-{index:05d}.parquet", made_from, part, values))
    return tasks


def _step(objectives: Sequence[str], weights: Array, gains: Array, errors: Array, table: pa.Table) -> Step:
    return Step(
        weights=_named(objectives, weights),
        gains=_named(objectives, gains),
        standard_errors=_named(objectives, errors),
        log_z=float(np.mean(table["log_z"].to_numpy())),
        num_tokens=float(np.mean(table["num_tokens"].to_numpy())),
    )


def _line(t: int, step: Step, seconds: float) -> str:
    shown = ", ".join(
        f"{name} {weight:.3f} ({step.gains[name]:+.3f} ± {step.standard_errors[name]:.3f})"
        for name, weight in step.weights.items()
    )
    return f"  step {t + 1}: λ (gain): {shown}; {seconds:.1f} s"


def _intervals(config: RunConfig, seen: Observations, known: Observations) -> Array | None:
    draws = config.fit.bootstrap_draws
    if draws == 0:
        return None
    rng = np.random.default_rng(config.seed)
    return weight_intervals(seen, known, draws=draws, confidence=config.fit.confidence, rng=rng)


def _fit(
    config: RunConfig,
    objectives: list[str],
    found: Answer,
    unit: float,
    steps: list[Step],
    alone: Mapping[str, tuple[Array, Array]],
    intervals: Array | None,
) -> DecodedFit:
    return DecodedFit(
        weights=_named(objectives, found.weights),
        gain=config.fit.decoded.gain,
        particles=config.decoding.particles,
        gains=_named(objectives, found.gains * unit),
        standard_errors=_named(objectives, found.errors * unit),
        average=_named(objectives, found.average),
        intervals=None if intervals is None else dict(zip(objectives, intervals.tolist(), strict=True)),
        steps=steps,
        policies={
            name: {"gains": _named(objectives, value), "standard_errors": _named(objectives, error)}
            for name, (value, error) in alone.items()
        },
    )


def _named(objectives: Sequence[str], values: Array) -> dict[str, float]:
    return dict(zip(objectives, values.tolist(), strict=True))
