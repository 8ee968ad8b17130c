"""The data stage: comparisons per objective, prompts for the fit and the evaluation, texts for SFT, the conflict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa

from mpo_ray.config import RunConfig
from mpo_ray.data import embedded
from mpo_ray.data.comparisons import Parsed, check_refused, check_share, read_comparisons
from mpo_ray.data.conflict import conflict_report
from mpo_ray.data.cuts import suspected
from mpo_ray.data.limits import Limits, check_lengths, model_context
from mpo_ray.data.prompts import is_heldout, read_prompts, select_prompts
from mpo_ray.data.rendering import Rendering
from mpo_ray.data.sources import DataError
from mpo_ray.data.texts import read_texts
from mpo_ray.evaluation.rewards import is_callable_spec, load_reward
from mpo_ray.policies.loading import load_rendering
from mpo_ray.policies.scratch import write_scratch_model
from mpo_ray.records import Comparison, Prompt, digest, encode_prompt, encode_reply, prompt_id
from mpo_ray.stages.stage import EMBEDDED, Context, Stage, source_content

ROWS_PER_PART = 512


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
    """Read, check, split and write everything the run learns from. Raises DataError before anything is trained."""
    config = context.config
    rendering = load_rendering(context.given_model(), **config.data.rendering)
    limits = Limits(
        prompt=config.data.max_prompt_tokens,
        response=config.data.max_response_tokens,
        context=model_context(context.given_model()),
    )
    parsed = {name: read_objective(context, name, rendering, limits) for name in config.objectives}
    counts = {name: _write_comparisons(context, name, item) for name, item in parsed.items()}
    conflict = conflict_report(
        {name: item.comparisons for name, item in parsed.items()},
        {name: load_reward(spec, objective=name) for name, spec in context.rewards().items() if is_callable_spec(spec)},
    )
    context.run.write_json("comparisons/counts.json", counts)
    context.run.write_json("comparisons/conflict.json", conflict.as_json())
    for name, item in parsed.items():
        if item.reading is not None:
            context.console.print(item.reading.as_text(name), markup=False, soft_wrap=True)
    context.console.print(conflict.as_text())
    _write_prompts(context, parsed, rendering, limits)
    if config.reference.sft is not None:
        counts["sft"] = _write_texts(context, rendering, limits)
    return counts


def read_objective(context: Context, name: str, rendering: Rendering, limits: Limits) -> Parsed:
    """One objective's comparisons, checked against the rules of its form and the lengths the model can take."""
    data, objective = context.config.data, context.config.objectives[name]
    source, accept = context.resolve(objective.preferences), rendering.accept
    parsed = read_comparisons(source, name, objective.label, objective.label_means, accept=accept)
    _tell_unread(context, rendering, f"objective {name!r}")
    check_refused(parsed, objective=name, allow=data.allow_bad_rows)
    found = check_lengths(parsed, rendering, limits, objective=name, overlong=data.overlong)
    _tell_cut(context, f"objective {name!r}", found.cut)
    if data.cut_replies == "finished":
        whole = [replace(c, chosen_cut=False, rejected_cut=False) for c in found.comparisons]
        found = replace(found, comparisons=whole)
    return found


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


def _write_prompts(context: Context, parsed: dict[str, Parsed], rendering: Rendering, limits: Limits) -> None:
    config = context.config
    known = list({prompt_id(c.prompt): c.prompt for item in parsed.values() for c in item.comparisons}.values())
    wanted = {
        "fit": (config.samples.prompts, config.samples.num_prompts, config.samples.max_new_tokens, False),
        "evaluation": (
            config.evaluation.prompts,
            config.evaluation.num_prompts,
            config.evaluation.max_new_tokens,
            True,
        ),
    }
    for use, (source, num, new_tokens, wants_heldout) in wanted.items():
        if source is None:
            available: Sequence[Prompt] = [p for p in known if heldout(config, p) == wants_heldout]
        else:
            allow = config.data.allow_bad_rows
            available = read_prompts(context.resolve(source), accept=rendering.accept, allow=allow)
            _tell_unread(context, rendering, f"prompts for the {use}")
        room = min(limits.prompt, limits.context - new_tokens)
        fitting = [p for p in available if len(rendering.prompt_ids(p)) <= room]
        if len(fitting) < len(available) and config.data.overlong == "error":
            raise DataError(
                f"prompts for the {use}: {len(available) - len(fitting)} of {len(available)} are longer than {room} "
                f"tokens, which is what max_prompt_tokens {limits.prompt} and the model's context {limits.context} "
                f"leave beside {new_tokens} new tokens. Lower max_new_tokens, or set data.overlong: drop."
            )
        if not fitting:
            raise DataError(f"prompts for the {use}: none of {len(available)} can be used; give `{use}` prompts.")
        rows = [{"prompt_id": prompt_id(p), **_prompt_columns(p)} for p in select_prompts(fitting, num, config.seed)]
        context.run.remove(f"prompts/{use}")
        _write_parts(context, f"prompts/{use}", "part", rows, config.scoring.prompts_per_part)


def _write_texts(context: Context, rendering: Rendering, limits: Limits) -> dict[str, Any]:
    sft = context.config.reference.sft
    assert sft is not None
    parsed = read_texts(context.resolve(sft.source), accept=rendering.accept)
    _tell_unread(context, rendering, "reference.sft.source")
    allow = context.config.data.allow_bad_rows
    check_share(parsed.refused, parsed.num_rows, what="reference.sft.source", allow=allow)
    sides: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": []}
    dropped, known, lengths = 0, 0, list[int]()
    for text in parsed.texts:
        is_cut = text.is_cut and context.config.data.cut_replies == "unfinished"
        before = "" if text.prompt is None else text.prompt
        prompt, response = rendering.ids(before, text.response, finished=not is_cut)
        known += text.is_cut
        lengths += [] if text.is_cut else [len(response) - 1]
        if not limits.allow(len(prompt), len(response)):
            dropped += 1
            continue
        # A text that stands alone is split by itself, one with a prompt by its prompt, a conversation by its opening.
        split_by = str(text.response) if text.prompt is None else text.opening or text.prompt
        side = "heldout" if heldout(context.config, split_by) else "train"
        sides[side].append({"prompt_ids": prompt, "response_ids": response})
    if dropped and context.config.data.overlong == "error":
        raise DataError(
            f"reference.sft.source: {dropped} of {len(parsed.texts)} texts are longer than {limits}; raise the limits, "
            "or set data.overlong: drop."
        )
    if not sides["train"]:
        raise DataError(f"reference.sft.source: no texts are left to train on, of {parsed.num_rows} rows.")
    context.run.remove("texts")
    for side, rows in sides.items():
        _write_parts(context, "texts", side, rows, 64 * ROWS_PER_PART)
    number, length = suspected(lengths, limits.response)
    cut = {"known": known, "suspected": number, "of_tokens": length} if known or number else {}
    _tell_cut(context, "reference.sft.source", cut)
    for reason, number in parsed.left_out.items():
        context.console.print(f"reference.sft.source: {number} {reason} are not learned", soft_wrap=True)
    told = {"refused": len(parsed.refused), "overlong": dropped, "left_out": parsed.left_out, "cut": cut}
    return {name: len(rows) for name, rows in sides.items()} | told


def _tell_unread(context: Context, rendering: Rendering, what: str) -> None:
    """Say which keys of messages the model will not see."""
    for key, number in sorted(rendering.unread.items()):
        context.console.print(f"  {what}: the chat template does not read {key!r} (messages that have it: {number})")
    rendering.unread.clear()


def _tell_cut(context: Context, what: str, cut: Mapping[str, int]) -> None:
    """Say how many replies were cut, or are likely to be, and what is learned of them."""
    if not cut:
        return
    learned = (
        "get no end token" if context.config.data.cut_replies == "unfinished" else "are learned as if they ended there"
    )
    if cut["known"]:
        told = (
            f"{what}: {cut['known']} replies were cut at a limit, as their rows say, and {learned} (data.cut_replies)"
        )
        context.console.print(told, markup=False, soft_wrap=True)
    if cut["suspected"]:
        told = (
            f"{what}: {cut['suspected']} replies have exactly {cut['of_tokens']} tokens: they were probably cut at a "
            "limit, and are learned as if they ended there, as no row says so. Give their rows "
            "`finish_reason: length`, or leave them out"
        )
        context.console.print(told, markup=False, soft_wrap=True)


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
