"""The data stage: comparisons per objective, prompts for the fit and the evaluation, texts for SFT, the conflict."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from mpo_ray.config import RunConfig
from mpo_ray.data import embedded
from mpo_ray.data.comparisons import Parsed
from mpo_ray.data.conflict import conflict_report
from mpo_ray.data.limits import model_context
from mpo_ray.data.problems import Problems
from mpo_ray.data.prompts import PlacedPrompt, is_heldout, select_prompts
from mpo_ray.data.sources import DataError
from mpo_ray.evaluation.rewards import is_callable_spec, load_reward
from mpo_ray.policies.given import find_policy
from mpo_ray.policies.loading import ModelError, is_adapter
from mpo_ray.policies.scratch import write_scratch_model
from mpo_ray.records import Comparison, Prompt, digest, encode_prompt, encode_reply, prompt_id
from mpo_ray.stages.data_reading import Reader, open_reader
from mpo_ray.stages.stage import EMBEDDED, Context, Stage, source_content

ROWS_PER_PART = 512
#: How long the rows of every table are, as the data stage found them.
LENGTHS = "comparisons/lengths.json"
#: The tokens of the longest prompt that is used for the fit, and for the evaluation.
LONGEST_PROMPTS = "prompts/longest.json"


def write_embedded(context: Context) -> None:
    """Write the embedded world: its texts, pairs and prompts, and an untrained model that knows its words."""
    world, seed = context.config.embedded, context.config.seed
    with context.run.publishing(EMBEDDED) as directory:
        embedded.write_world(
            directory,
            num_texts=world.num_texts,
            num_pairs=world.num_pairs,
            num_prompts=world.num_prompts,
            seed=seed,
        )
        write_scratch_model(
            directory / "model",
            embedded.vocabulary(),
            hidden_size=world.hidden_size,
            num_layers=world.num_layers,
            context=embedded.CONTEXT,
            seed=seed,
        )


def prepare_data(context: Context) -> dict[str, Any]:
    """Read, check, split and write everything the run learns from. Raises DataProblemsError before anything is trained.

    A problem of one table does not hide those of the others: they are raised together.
    """
    problems = Problems()
    reader = open_reader(context, problems)
    parsed = {name: item for name in context.config.objectives if (item := reader.comparisons(name)) is not None}
    counts: dict[str, Any] = {}
    for name, item in parsed.items():
        with problems.kept():
            counts[name] = _write_comparisons(context, name, item)
    context.run.write_json("comparisons/counts.json", counts)
    for name, item in parsed.items():
        if item.reading is not None:
            context.console.print(item.reading.as_text(name), markup=False, soft_wrap=True)
    with problems.kept():
        _write_conflict(context, parsed)
    _write_prompts(context, parsed, reader)
    if context.config.reference.sft is not None:
        with problems.kept():
            counts["sft"] = _write_texts(context, reader)
    context.run.write_json(LENGTHS, [table.as_json() for table in reader.lengths])
    with problems.kept():
        check_contexts(context)
    problems.raise_all()
    return counts


def check_contexts(context: Context) -> None:
    """Refuse a model of `evaluation.models` whose context is too short for the prompts. Raises ModelError."""
    longest = (context.run.read_json(LONGEST_PROMPTS) or {}).get("evaluation")
    if longest is None:
        return
    new = context.config.evaluation.max_new_tokens
    for name, path in context.compared_models().items():
        model = find_policy(path)
        limit = None if is_adapter(model) else model_context(str(model))
        if limit is not None and longest + new > limit:
            raise ModelError(
                f"evaluation.models.{name}: {path} has a context of {limit} tokens, and the longest prompt of the "
                f"evaluation has {longest}, with {new} new tokens behind it. Lower evaluation.max_new_tokens, give "
                "shorter prompts, or remove the model."
            )


def _write_conflict(context: Context, parsed: dict[str, Parsed]) -> None:
    rewards = {
        name: load_reward(spec, objective=name)
        for name, spec in context.rewards().items()
        if name in parsed and is_callable_spec(spec)
    }
    conflict = conflict_report({name: item.comparisons for name, item in parsed.items()}, rewards)
    context.run.write_json("comparisons/conflict.json", conflict.as_json())
    context.console.print(conflict.as_text())


def heldout(config: RunConfig, prompt: Prompt) -> bool:
    return is_heldout(prompt_id(prompt), share=config.data.heldout_share, seed=config.seed)


def _write_comparisons(context: Context, name: str, parsed: Parsed) -> dict[str, Any]:
    config = context.config
    chosen = sorted(parsed.comparisons, key=lambda c: digest([config.seed, c.id]))[: config.data.max_pairs]
    sides: dict[str, list[Comparison]] = {"train": [], "heldout": []}
    for comparison in chosen:
        sides["heldout" if heldout(config, comparison.prompt) else "train"].append(comparison)
    if not sides["train"]:
        raise DataError(
            f"objective {name!r}: all {len(chosen)} pairs are held out (data.heldout_share is "
            f"{config.data.heldout_share}); lower the share or bring more prompts."
        )
    context.run.remove(f"comparisons/{name}")
    for side, comparisons in sides.items():
        rows = [
            {
                "id": c.id,
                "prompt_id": prompt_id(c.prompt),
                **_prompt_columns(c.prompt),
                "chosen": encode_reply(c.chosen)[0],
                "rejected": encode_reply(c.rejected)[0],
                "weight": c.weight,
                "margin": c.margin,
            }
            for c in comparisons
        ]
        if any(not isinstance(reply, str) for c in comparisons for reply in (c.chosen, c.rejected)):
            for row, c in zip(rows, comparisons, strict=True):
                row |= {f"{side}_is_message": encode_reply(getattr(c, side))[1] for side in ("chosen", "rejected")}
        if any(c.chosen_cut or c.rejected_cut for c in comparisons):
            for row, c in zip(rows, comparisons, strict=True):
                row |= {"chosen_is_cut": c.chosen_cut, "rejected_is_cut": c.rejected_cut}
        _write_parts(context, f"comparisons/{name}", side, rows, ROWS_PER_PART)
    reasons = Counter(refusal.reason.partition(":")[0] for refusal in parsed.refused)
    return {
        "form": parsed.form,
        "reading": None if parsed.reading is None else asdict(parsed.reading),
        "rows": parsed.num_rows,
        "train": len(sides["train"]),
        "heldout": len(sides["heldout"]),
        "skipped": parsed.skipped,
        "refused": dict(reasons),
        "cut": parsed.cut,
    }


def _write_prompts(context: Context, parsed: dict[str, Parsed], reader: Reader) -> None:
    config = context.config
    known = {
        prompt_id(c.prompt): PlacedPrompt(c.where, c.prompt, num_tokens=c.num_tokens[0])
        for item in parsed.values()
        for c in item.comparisons
    }
    wanted = {
        "fit": (config.samples.prompts, config.samples.num_prompts, config.samples.max_new_tokens, False),
        "evaluation": (
            config.evaluation.prompts,
            config.evaluation.num_prompts,
            config.evaluation.max_new_tokens,
            True,
        ),
    }
    longest: dict[str, int] = {}
    for use, (source, num, new_tokens, wants_heldout) in wanted.items():
        with reader.problems.kept():
            if source is None:
                if not known:
                    continue  # every objective has its own problem
                available = [p for p in known.values() if heldout(config, p.prompt) == wants_heldout]
            else:
                available = reader.prompts(source, use)
            fitting = reader.fitting_prompts(available, use, new_tokens)
            rows = [
                {"prompt_id": prompt_id(p), **_prompt_columns(p)} for p in select_prompts(fitting, num, config.seed)
            ]
            context.run.remove(f"prompts/{use}")
            _write_parts(context, f"prompts/{use}", "part", rows, config.scoring.prompts_per_part)
            lengths = {prompt_id(placed.prompt): placed.num_tokens for placed in available}
            longest[use] = max(lengths[row["prompt_id"]] for row in rows)
    context.run.write_json(LONGEST_PROMPTS, longest)


def _write_texts(context: Context, reader: Reader) -> dict[str, Any]:
    parsed, fitting, told = reader.texts()
    sides: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": []}
    for text in fitting:
        # A text that stands alone is split by itself, one with a prompt by its prompt, a conversation by its opening.
        split_by = str(text.response) if text.prompt is None else text.opening or text.prompt
        side = "heldout" if heldout(context.config, split_by) else "train"
        sides[side].append({"prompt_ids": text.prompt_ids, "response_ids": text.response_ids})
    if not sides["train"]:
        raise DataError(f"reference.sft.source: no texts are left to train on, of {parsed.num_rows} rows.")
    context.run.remove("texts")
    for side, rows in sides.items():
        _write_parts(context, "texts", side, rows, 64 * ROWS_PER_PART)
    return {name: len(rows) for name, rows in sides.items()} | told


def _prompt_columns(prompt: Prompt) -> dict[str, Any]:
    text, is_chat = encode_prompt(prompt)
    return {"prompt": text, "is_chat": is_chat}


def _write_parts(context: Context, node: str, prefix: str, rows: list[dict[str, Any]], size: int) -> None:
    """Write rows as files that are known by their content: what is made from them is made again only if it changed."""
    for index, start in enumerate(range(0, len(rows), size)):
        part = rows[start : start + size]
        context.run.write_table(f"{node}/{prefix}-{index:05d}.parquet", pa.Table.from_pylist(part), inputs=digest(part))


EMBEDDED_STAGE = Stage(
    name=EMBEDDED,
    title="Embedded world",
    after=(),
    outputs=lambda context: [EMBEDDED],
    depends_on=lambda context: [context.config.embedded.model_dump(), context.config.seed],
    work=write_embedded,
)


def _depends_on(context: Context) -> Any:
    config = context.config
    return [
        config.seed,
        config.data.model_dump(),
        {name: [source_content(o.preferences), o.label, o.label_means] for name, o in config.objectives.items()},
        config.reference.sft and source_content(config.reference.sft.source),
        [
            (use.prompts and source_content(use.prompts), use.num_prompts, use.max_new_tokens)
            for use in (config.samples, config.evaluation)
        ],
        config.scoring.prompts_per_part,
        context.given_content(),
    ]


DATA_STAGE = Stage(
    name="data",
    title="Comparisons and prompts",
    after=(EMBEDDED,),
    outputs=lambda context: ["comparisons", "prompts"],
    depends_on=_depends_on,
    work=prepare_data,
)
