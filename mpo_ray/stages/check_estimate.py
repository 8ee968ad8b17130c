"""What `mpo-ray check` says a run will take on this machine, and the stages that would not fit in it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from peft import get_peft_model

from mpo_ray.cluster.engines import actor_device
from mpo_ray.cluster.training_room import num_side_by_side
from mpo_ray.config import RunConfig
from mpo_ray.config_training import Workers
from mpo_ray.data.lengths import TableLengths
from mpo_ray.policies.loading import empty_model, load_rendering
from mpo_ray.policies.lora_targets import lora_config
from mpo_ray.policies.precision import resolve
from mpo_ray.records import decode_prompt, decode_reply
from mpo_ray.run import Run
from mpo_ray.stages.estimate import Need, Shape, Speeds
from mpo_ray.stages.estimate_stages import Estimator, Table, Tables
from mpo_ray.stages.stage import Context
from mpo_ray.stages.timing import measure_speeds
from mpo_ray.training.preference import Pair

#: Pairs that are timed, and how many times its weights a model must have free before it is timed here.
NUM_PAIRS, ROOM = 64, 4


@dataclass(frozen=True, slots=True)
class Estimates:
    """free_memory, free_gpu, free_disk: bytes of this machine, and of its GPU that has most free.

    They are None without a GPU, and where the storage is elsewhere. timed: whether times were measured, or why not
    """

    needs: Sequence[Need]
    free_memory: int
    free_disk: int | None
    num_nodes: int
    timed: str
    free_gpu: int | None = None

    def cautions(self) -> list[str]:
        """The stages that would not fit, each with the setting that lowers what it takes."""
        found = []
        for need in self.needs:
            free = self.free_gpu if need.on_gpu else self.free_memory
            where = "a GPU of this machine" if need.on_gpu else "this machine"
            if free is None:
                continue
            remedy = need.remedy(free, num_nodes=self.num_nodes)
            if remedy is not None:
                found.append(
                    f"{need.stage}: holds about {need.processes} × {size(need.bytes_each)} of memory by this estimate, "
                    f"and {size(free)} are free on {where}. To lower it: {remedy}."
                )
        total = sum(need.disk for need in self.needs)
        if self.free_disk is not None and total > self.free_disk:
            most = max(self.needs, key=lambda need: need.disk).stage
            found.append(
                f"storage: the run leaves about {size(total)} by this estimate, most of it in {most}, and "
                f"{size(self.free_disk)} are free there. Set `storage:` to a place with more room."
            )
        return found

    def as_text(self) -> str:
        rows = [("estimate", "time", "memory", "disk")]
        rows += [
            (n.stage, duration(n.seconds), f"{n.processes} × {size(n.bytes_each)}", size(n.disk)) for n in self.needs
        ]
        seconds = None if any(n.seconds is None for n in self.needs) else sum(n.seconds or 0.0 for n in self.needs)
        rows.append(("all", duration(seconds), "", size(sum(n.disk for n in self.needs))))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            ).rstrip()
            for row in rows
        ]
        disk = "" if self.free_disk is None else f", {size(self.free_disk)} of disk"
        gpu = "" if self.free_gpu is None else f", {size(self.free_gpu)} of a GPU's memory"
        lines.append(f"free here: {size(self.free_memory)} of memory{gpu}{disk}. {self.timed}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        needs = [{**asdict(n), "bytes_each": n.bytes_each, "memory": dict(n.memory)} for n in self.needs]
        return {
            "stages": needs,
            "free_memory": self.free_memory,
            "free_gpu": self.free_gpu,
            "free_disk": self.free_disk,
            "timed": self.timed,
        }


def estimate_run(
    context: Context, counts: Mapping[str, Any], lengths: Sequence[TableLengths], *, timing: bool
) -> Estimates:
    """Estimate every stage that holds models. context: of a run whose data are written; counts, lengths: of its tables

    timing: whether to time some batches
    """
    path = context.given_model()
    precision = resolve(context.config.scoring.precision, path, actor_device(context.config.scoring))
    scoring = context.config.scoring.model_copy(update={"precision": precision})
    config = context.config.model_copy(update={"scoring": scoring})
    shape, tables = model_shape(config, path), _tables(context, counts, lengths)
    weights = 4 * shape.parameters
    free = int(psutil.virtual_memory().available)
    speeds = None
    if not timing:
        timed = "Times were not asked for (--no-timing)."
    elif not Path(path).is_dir():
        timed = "Times need the model's files on this machine, and it is named by a hub id."
    elif ROOM * weights > free:
        timed = f"Times were not measured: the model may need {size(ROOM * weights)} of memory here."
    else:
        speeds, timed = _speeds(context, config, path), "Times are of a few timed batches; a busy machine is slower."
    found = Estimator(config, shape, tables, speeds, _side_by_side(config))
    storage = Run(config.storage, config.name)
    disk = shutil.disk_usage(_existing(storage.local)).free if storage.is_local else None
    return Estimates(found.needs(), free, disk, max(1, sum(node["Alive"] for node in ray.nodes())), timed, _free_gpu())


def model_shape(config: RunConfig, path: str) -> Shape:
    """The sizes of a model, by its configuration, and of the adapter that a policy gets."""
    model = empty_model(path)
    text, lora = model.config.get_text_config(), config.policies.lora
    heads = int(getattr(text, "num_attention_heads", None) or 1)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    parameters, adapter = sum(parameter.numel() for parameter in model.parameters()), 0
    if lora is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            adapted = get_peft_model(model, lora_config(model, **lora.model_dump()))
        adapter = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return Shape(
        parameters=parameters,
        adapter=adapter,
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        inner=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        kv_width=int(getattr(text, "num_key_value_heads", None) or heads) * width,
        vocabulary=int(text.vocab_size),
    )


def size(number: float) -> str:
    """Bytes as a person reads them: two digits that count, in MB or GB."""
    if number < 1e6:
        return "< 1 MB"
    unit, value = ("GB", number / 1e9) if number >= 1e9 else ("MB", number / 1e6)
    return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds as a person reads them; `–` where they are not known."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _tables(context: Context, counts: Mapping[str, Any], lengths: Sequence[TableLengths]) -> Tables:
    """The numbers of rows as the data stage counted them, beside their lengths."""
    run, by_name = context.run, {table.what: table for table in lengths}
    pairs = {name: _table(counts[name], by_name[name]) for name in context.config.objectives}
    texts = None
    if context.config.reference.sft is not None:
        texts = _table(counts["sft"], by_name["texts for SFT"])
    fit, evaluation = (run.read_table(f"prompts/{use}", ["prompt_id"]).num_rows for use in ("fit", "evaluation"))
    return Tables(pairs, texts, fit, evaluation)


def _table(counts: dict[str, Any], lengths: TableLengths) -> Table:
    assert lengths.reply is not None
    assert lengths.kept is not None
    return Table(counts["train"], counts["heldout"], lengths.prompt, lengths.reply, lengths.kept)


def _speeds(context: Context, config: RunConfig, path: str) -> Speeds:
    scoring = config.scoring
    rendering = load_rendering(path, **config.data.rendering)
    part = next(p for p in context.run.parts(f"comparisons/{next(iter(config.objectives))}") if "/train-" in p)
    pairs = []
    for row in context.run.read_table(part).slice(0, NUM_PAIRS).to_pylist():
        replies = [decode_reply(row[side], row.get(f"{side}_is_message", False)) for side in ("chosen", "rejected")]
        prompt, both = rendering.ids_of_replies(
            decode_prompt(row["prompt"], row["is_chat"]), replies, finished=[True, True]
        )
        pairs.append(Pair(prompt, both[0], both[1], 0.0, 0.0))
    return measure_speeds(
        path,
        config.policies,
        config.reference.sft,
        pairs,
        ends=rendering.ends,
        pad_id=rendering.tokenizer.pad_token_id,
        seed=config.seed,
        scored_rows=scoring.batch_size,
        decoded_rows=min(scoring.batch_size, scoring.prompts_per_part * config.samples.samples_per_prompt),
        precision=scoring.precision,
        cpus_per_actor=scoring.cpus_per_actor,
    )


def _side_by_side(config: RunConfig) -> dict[str, int]:
    """How many trainings of each kind the cluster holds at once; one at least, whatever it lacks."""
    kinds: dict[str, Workers] = {"policies": config.policies.workers}
    if config.reference.sft is not None:
        kinds["reference.sft"] = config.reference.sft.workers
    if config.mopo is not None:
        kinds["mopo.training"] = config.mopo.training.workers
    return {place: max(1, num_side_by_side(workers)) for place, workers in kinds.items()}


def _free_gpu() -> int | None:
    """Free bytes of the GPU that has most; None without one."""
    return max((torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())), default=None)


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())
