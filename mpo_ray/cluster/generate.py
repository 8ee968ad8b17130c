"""Completions for files of prompts on Ray Data: a directory of parts, each made by an actor that holds an engine.

prompts/part-*.parquet       row, id, prompt, is_chat, prompt_ids
completions/part-*.parquet   the same and, for each of n samples, what `COLUMNS` names
jsonl/part-*.jsonl           the completions again, where they are asked for
config.yaml                  how they were made

A completion depends on its row's prompt and number, not on its part or actor, so a broken run ends as an unbroken one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from rich.console import Console

from mpo_ray.cluster.engines import actor_device
from mpo_ray.cluster.parts import Part, process_parts
from mpo_ray.cluster.preflight import check_actors, check_storage_everywhere
from mpo_ray.config import Actors
from mpo_ray.config_serving import Serve
from mpo_ray.data.prompts import PlacedPrompt
from mpo_ray.data.sources import DataError
from mpo_ray.decoding.offline import Completion, Recipe, check_recipe, complete, lanes_for, row_seed
from mpo_ray.decoding.open_engine import open_engine
from mpo_ray.decoding.protocol import RequestError
from mpo_ray.policies.loading import load_rendering
from mpo_ray.policies.mixture import mixture_config
from mpo_ray.policies.mixture_config import MixtureConfig
from mpo_ray.policies.precision import AUTO, resolve
from mpo_ray.records import chat_of, decode_prompt, digest, encode_prompt
from mpo_ray.run import Run
from mpo_ray.run_lock import locked

PROMPTS, COMPLETIONS, JSONL = "prompts", "completions", "jsonl"
#: Prompts that cannot be used and are named in the message.
NUM_NAMED = 5

logger = logging.getLogger(__name__)

_PROMPT_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("is_chat", pa.bool_()),
        ("prompt_ids", pa.list_(pa.int32())),
    ]
)
#: What a completion's row has beside its prompt. `error` says why there is no completion; log_z … are `Diagnostics`.
COLUMNS = pa.schema(
    [
        ("sample", pa.int32()),
        ("completion", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("seed", pa.int64()),
        ("mode", pa.string()),
        ("log_z", pa.float64()),
        ("log_z_hat", pa.float64()),
        ("effective_sample_size", pa.float64()),
        ("particles", pa.int32()),
        ("attempts", pa.int32()),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many completions there are, and how many could not be made: their rows say why."""

    num_completions: int
    num_failed: int


class Generator:
    """A table of prompts → their completions, all of them handed to the engine at once."""

    def __init__(self, artefact: str, recipe: Recipe, num_samples: int, engine: Mapping[str, Any]) -> None:
        """engine: arguments of `open_engine`"""
        self._recipe, self._num = recipe, num_samples
        self._engine = open_engine(artefact, **engine)

    def __call__(self, table: pa.Table, values: dict[str, Any]) -> pa.Table:
        """values: `seed`, which with the row's number gives the seed of each completion."""
        rows = [(row, sample) for row in table.to_pylist() for sample in range(self._num)]
        seeds = [row_seed(values["seed"], row["row"], sample) for row, sample in rows]
        requests = [
            self._recipe.request(
                f"{row['row']}/{sample}", row["prompt_ids"], seed=seed, continues_text=not row["is_chat"]
            )
            for (row, sample), seed in zip(rows, seeds, strict=True)
        ]
        finished = complete(self._engine, requests)
        made = [
            row | {"sample": sample, "seed": seed, "mode": self._recipe.mode.kind} | _columns(completion)
            for (row, sample), seed, completion in zip(rows, seeds, finished, strict=True)
        ]
        return pa.Table.from_pylist(made, schema=pa.schema([*_PROMPT_SCHEMA, *COLUMNS]))


def generate_parts(
    artefact: str,
    prompts: Sequence[PlacedPrompt],
    recipe: Recipe,
    out: str,
    *,
    num_samples: int,
    seed: int,
    serve: Serve,
    actors: Actors,
    jsonl: bool,
    console: Console,
) -> Outcome:
    """Make every part that is not there yet from the same prompts. On a cluster; artefact and `out` lie where all of
    its nodes find them.

    Raises ValueError for prompts or settings that cannot be, and for a directory that holds something else.
    """
    rows, context = prompt_rows(artefact, prompts, recipe, serve.context)
    run = _directory(out, _record(artefact, recipe, num_samples, seed, serve.precision, actor_device(actors)))
    with locked(run, "mpo-ray generate", say=console.print):
        run.sweep()
        check_actors(actors)
        check_storage_everywhere(run)
        settings = run.read_config()
        assert settings is not None
        parts = []
        for number, start in enumerate(range(0, len(rows), actors.prompts_per_part)):
            part = rows[start : start + actors.prompts_per_part]
            name, inputs = f"part-{number:05d}", digest([_decides(settings), part])
            source = f"{PROMPTS}/{name}.parquet"
            if not run.exists(source) or run.inputs_of(source) != inputs:
                run.write_table(source, pa.Table.from_pylist(part, schema=_PROMPT_SCHEMA), inputs=inputs)
            parts.append(Part(source, f"{COMPLETIONS}/{name}.parquet", inputs, {"seed": seed}))
        for left_over in set(run.parts(PROMPTS)) - {part.source for part in parts}:
            run.remove(left_over)
        process_parts(
            run,
            parts,
            Generator,
            {
                "artefact": str(Path(artefact).absolute()),
                "recipe": recipe,
                "num_samples": num_samples,
                "engine": {
                    "max_num_seqs": lanes_for(recipe, serve.max_num_seqs),
                    "context": context,
                    "kv_cache_gib": serve.kv_cache_gib,
                    "least_tokens": context,
                    "precision": settings.get(DECIDED, serve.precision),
                },
            },
            actors=actors,
            console=console,
            title="completions",
            remedy=f"Lower --kv-cache-gib, --lanes (now {serve.max_num_seqs}) or --max-tokens.",
        )
        return _summary(run, parts, jsonl=jsonl)


def prompt_rows(
    artefact: str, prompts: Sequence[PlacedPrompt], recipe: Recipe, context: int | None = None
) -> tuple[list[dict[str, Any]], int]:
    """The prompts as rows of a table, and the tokens that the longest one and its completion take.

    Raises RequestError for a recipe that no prompt can be decoded with, DataError for prompts that it cannot.
    """
    config = MixtureConfig.from_pretrained(artefact)
    rendering = load_rendering(artefact, text=config.text)
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    for number, placed in enumerate(prompts):
        try:
            prompt, _ = rendering.accept(placed.prompt)
            ids = rendering.prompt_ids(prompt)
            check_recipe(recipe, config, ids, context)
        except RequestError as error:
            if error.param != "prompt":
                raise
            refused.append(f"{placed.where}: {error}")
        except ValueError as error:  # what the template or the tokenizer cannot render
            refused.append(f"{placed.where}: {error}")
        else:
            text, is_chat = encode_prompt(prompt)
            rows.append({"row": number, "id": placed.id, "prompt": text, "is_chat": is_chat, "prompt_ids": ids})
    for key, times in sorted(rendering.unread.items()):
        logger.warning("the chat template does not read %r (messages that have it: %d)", key, times)
    if refused:
        more = [f"… and {len(refused) - NUM_NAMED} more"] if len(refused) > NUM_NAMED else []
        lines = "\n  ".join([*refused[:NUM_NAMED], *more])
        raise DataError(f"{len(refused)} of {len(prompts)} prompts cannot be answered:\n  {lines}")
    return rows, max(len(row["prompt_ids"]) for row in rows) + recipe.sampling.max_tokens


def _columns(completion: Completion) -> dict[str, Any]:
    measured = {} if completion.diagnostics is None else asdict(completion.diagnostics)
    names = ("log_z", "log_z_hat", "effective_sample_size", "particles", "attempts")
    return {
        "completion": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "error": completion.error,
        **{name: measured.get(name) for name in names},
    }


def _record(artefact: str, recipe: Recipe, num_samples: int, seed: int, precision: str, device: str) -> dict[str, Any]:
    """What config.yaml says. `mixture` names the content: policies, reference, vocabulary, the ends of a text.

    What `precision: auto` stands for is decided with the directory: actors that each timed a product could differ.
    """
    config = mixture_config(Path(artefact))
    files, ends = (json.loads((Path(artefact) / name).read_text("utf-8")) for name in _MODEL_FILES)
    for values in (files, ends):
        values.pop("transformers_version", None)
    made = recipe.as_json()
    return {
        "artefact": str(Path(artefact).absolute()),
        "mixture": digest([files, ends]),
        "seed": seed,
        "num_samples": num_samples,
        **made.pop("sampling"),
        "mode": made["mode"],
        "weights": made["weights"],
        **({DECIDED: resolve(AUTO, config, device)} if precision == AUTO else {"precision": precision}),
    }


#: The key for what `precision: auto` stands for in a directory.
DECIDED = "precision_auto"
_MODEL_FILES = ("config.json", "generation_config.json")


def _decides(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the completions depend on, beside what is decided: not the place of the artefact."""
    return {key: value for key, value in settings.items() if key not in ("artefact", DECIDED)}


def _directory(out: str, settings: dict[str, Any]) -> Run:
    """The directory as a place for parts. Raises DataError where it holds something else."""
    storage, _, name = (out if "://" in out else str(Path(out).absolute())).rstrip("/").rpartition("/")
    run = Run(storage, name)
    before = run.read_config()
    if before is None:
        if run.is_local and run.local.exists() and (not run.local.is_dir() or any(run.local.iterdir())):
            raise DataError(f"{out}: holds something else already. Name a directory for the completions with --out.")
        run.check_writable()
        run.write_text("config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        return run
    old, new = _decides(before), _decides(settings)
    if differing := next((key for key in {**old, **new} if old.get(key) != new.get(key)), None):
        raise DataError(
            f"{out}: holds completions that were made with {differing} {old.get(differing)!r}; now it is "
            f"{new.get(differing)!r}. Name another directory with --out, or remove this one."
        )
    return run


def _summary(run: Run, parts: Sequence[Part], *, jsonl: bool) -> Outcome:
    num_completions = num_failed = 0
    run.remove(JSONL)
    for part in parts:
        if jsonl:
            rows = run.read_table(part.target).to_pylist()
            text = "".join(json.dumps(_line(row), ensure_ascii=False) + "\n" for row in rows)
            run.write_text(part.target.replace(COMPLETIONS, JSONL).replace(".parquet", ".jsonl"), text)
        errors = run.read_table(part.target, ["error"])["error"]
        num_completions += len(errors) - (failed := len(errors) - errors.null_count)
        num_failed += failed
    return Outcome(num_completions, num_failed)


def _line(row: dict[str, Any]) -> dict[str, Any]:
    prompt = decode_prompt(row["prompt"], row["is_chat"])
    written: dict[str, Any] = {"prompt": prompt}
    if not isinstance(prompt, str):
        messages, tools = chat_of(prompt)
        written = {"prompt": list(messages)} | ({"tools": list(tools)} if tools else {})
    return {k: v for k, v in row.items() if k not in ("prompt_ids", "is_chat")} | written
