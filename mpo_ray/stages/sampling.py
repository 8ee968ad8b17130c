"""The stages that make the score table (design 5.2): responses of every proposal, their log-ratios and rewards.

A proposal is who draws: π_ref, or the policy of an objective. Each has its own files, and each column of the scores its
own record of what it was made from, so that an objective that is added costs its policy's responses and its columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpo_ray.cluster.engines import drawing_inputs
from mpo_ray.cluster.parts import Part, process_parts
from mpo_ray.cluster.score import Sampler, SampleScorer
from mpo_ray.config import RunConfig
from mpo_ray.evaluation.rewards import IMPLICIT
from mpo_ray.records import REFERENCE, digest
from mpo_ray.run import Run, stage_inputs
from mpo_ray.stages.stage import Context, Stage, content
from mpo_ray.stages.training import actor_settings


def proposals(config: RunConfig) -> list[str]:
    """Who draws, as `samples.proposals` says: π_ref, the policies by their objectives, or both."""
    policies = list(config.objectives)
    return {"reference": [REFERENCE], "policies": policies, "all": [REFERENCE, *policies]}[config.samples.proposals]


def sample(context: Context) -> dict[str, Any]:
    """Draw m responses per prompt of the fit from each proposal."""
    config, run = context.config, context.run
    names = proposals(config)
    parts = [
        _sample_part(context, name, number, index, source)
        for name, number in _numbers(run, names).items()
        for index, source in enumerate(run.parts("prompts/fit"))
    ]
    process_parts(
        run,
        parts,
        Sampler,
        {
            "reference": context.reference(),
            "policies": {name: path for name, path in context.policies().items() if name in names},
            "actors": context.scoring().model_dump(),
            "rendering": config.data.rendering,
            "num_samples": config.samples.samples_per_prompt,
            "max_new_tokens": config.samples.max_new_tokens,
        },
        actors=context.scoring(),
        console=context.console,
        title="samples",
    )
    found = sample_counts(run)
    shares = ", ".join(f"{name} {1 - one['finished']:.0%}" for name, one in found.items())
    context.console.print(f"  samples that were cut at {config.samples.max_new_tokens} tokens: {shares}", markup=False)
    return {name: found[name] for name in names}


def sample_counts(run: Run) -> dict[str, dict[str, float]]:
    """Of every proposal: how many samples it drew, which share of them finished, and their mean length."""
    drawn = run.read_table("samples", ["proposal", "finished", "num_tokens"])
    by, finished, lengths = (np.array(drawn[name].to_pylist()) for name in drawn.column_names)
    return {
        str(name): {
            "samples": int((by == name).sum()),
            "finished": float(finished[by == name].mean()),
            "num_tokens": float(lengths[by == name].mean()),
        }
        for name in dict.fromkeys(by.tolist())
    }


def score(context: Context) -> None:
    """Log-ratios of every policy and rewards of every objective on the samples."""
    config, run = context.config, context.run
    parts = []
    for source in run.parts("samples"):
        columns = _column_inputs(context, str(run.inputs_of(source)))
        target = f"scores/{source.rpartition('/')[2]}"
        parts.append(Part(source, target, digest(list(columns.items())), columns=columns))
    process_parts(
        run,
        parts,
        SampleScorer,
        {
            "reference": context.reference(),
            "policies": context.policies(),
            "rewards": context.rewards(),
            "beta": config.policies.beta,
            "actors": context.scoring().model_dump(),
            "rendering": config.data.rendering,
        },
        actors=context.scoring(),
        console=context.console,
        title="scores",
    )


def _numbers(run: Run, names: list[str]) -> dict[str, int]:
    """Number the proposals, for the ids of their samples: in their order, and for good once the run has done so."""
    node = "samples/proposals.json"
    known: dict[str, int] = run.read_json(node) or {REFERENCE: 0}
    numbers = dict(known)
    for name in names:
        numbers.setdefault(name, len(numbers))
    if numbers != known or not run.exists(node):
        run.write_json(node, numbers)
    return {name: numbers[name] for name in names}


def _sample_part(context: Context, proposal: str, number: int, index: int, source: str) -> Part:
    config = context.config
    settings = config.samples
    values = {
        "proposal": proposal,
        "first_id": number * settings.samples_per_prompt,
        "seed": int(digest([config.seed, proposal, index])[:12], 16),
    }
    inputs = stage_inputs(
        "samples",
        values,
        [
            settings.samples_per_prompt,
            settings.max_new_tokens,
            context.scoring().precision,
            *drawing_inputs(config.scoring),
        ],
        context.run.inputs_of(source),
        context.reference_inputs(),
        None if proposal == REFERENCE else context.trained_from(f"policies/{proposal}"),
    )
    return Part(source, f"samples/{proposal}-{source.rpartition('/')[2]}", inputs, values)


def _column_inputs(context: Context, samples: str) -> dict[str, str]:
    """What each column of a file of scores is made from, given what its samples were made from."""
    config = context.config
    ratios = {
        name: stage_inputs("log_ratio", samples, context.trained_from(f"policies/{name}"), context.scoring().precision)
        for name in config.objectives
    }
    rewards = {
        name: stage_inputs(
            "reward", samples, *([ratios[name], config.policies.beta] if spec == IMPLICIT else [content(spec)])
        )
        for name, spec in context.rewards().items()
    }
    return {f"log_ratio_{name}": value for name, value in ratios.items()} | {
        f"reward_{name}": value for name, value in rewards.items()
    }


SAMPLES = Stage(
    name="samples",
    title="Samples of the reference and the policies",
    after=("policies",),
    outputs=lambda context: ["samples"],
    depends_on=lambda context: [
        context.config.samples.model_dump(),
        actor_settings(context),
        context.config.seed,
        *drawing_inputs(context.config.scoring),
    ],
    work=sample,
)
SCORES = Stage(
    name="scores",
    title="Scores",
    after=("samples",),
    outputs=lambda context: ["scores"],
    depends_on=lambda context: [
        actor_settings(context),
        {name: content(spec) for name, spec in context.rewards().items()},
    ],
    work=score,
)
