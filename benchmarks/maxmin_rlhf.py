"""MPO against the reinforcement learning that it spares: MaxMin-RLHF and MORLHF, quality and cost side by side.

    python benchmarks/stage_costs.py configs/imdb.yaml      # a run, with what each stage costs
    python benchmarks/maxmin_rlhf.py --run runs/imdb        # both baselines, trained and compared with it

Trains both baselines with TRL (benchmarks/rl_training.py: the run's reference, LoRA, prompts and β), each in a process
of its own; draws their completions of the run's evaluation prompts; and compares them with the run's own completions by
the run's own rewards. Writes comparison.json, curves.png and the trained policies to `--out`, by default `RUN/rl`.

Processor-seconds are user and system time of all processes, imports included. The preparation of the data and the
fine-tuning of π_ref serve all four rows and count for none; neither does the evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table
from rl_curves import write_curves
from rl_training import METHODS, add_training_options, open_context
from stage_costs import COSTS

from mpo_ray.cluster.engines import room_of
from mpo_ray.cluster.score import draw, load_rewards, log_ratios, sequences, with_rewards
from mpo_ray.decoding.sampler import MixtureSampler, sampling_recipe
from mpo_ray.evaluation.divergence import divergences
from mpo_ray.evaluation.estimates import number, written
from mpo_ray.evaluation.metrics import Metrics, evaluate_completions
from mpo_ray.evaluation.rewards import IMPLICIT
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.policies.loading import load_model, load_policy, load_rendering
from mpo_ray.policies.mixture import mixture_of_one
from mpo_ray.records import digest
from mpo_ray.run import Run
from mpo_ray.stages.stage import Context
from mpo_ray.storage import RunError

HOW_TO = (
    "give a finished run: --run DIRECTORY. To make one, and to measure what its stages cost:\n"
    "    python benchmarks/stage_costs.py configs/imdb.yaml\n"
    "`mpo-ray run configs/imdb.yaml` makes one too, without the processor-seconds of MPO's side."
)
GIVEN_POLICIES = "MPO, given its policies"
WITH_POLICIES = "MPO, policies trained too"
STAGES = {
    GIVEN_POLICIES: ("samples", "scores", "fit", "mixture"),
    WITH_POLICIES: ("pairs", "policies", "samples", "scores", "fit", "mixture"),
}
#: Large blocks come and go at every token of a generation: glibc keeps them instead of asking the kernel anew.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
#: With these, and the candidate's name, completions of two makers can be compared.
COLUMNS = ("candidate", "prompt_id", "completion_id", "num_tokens", "finished", "kl", "log_z")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="directory of a finished run")
    parser.add_argument("--out", type=Path, help="RUN/rl if absent")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add_training_options(parser)
    options = parser.parse_args(arguments)
    if options.run is None:
        print(HOW_TO, file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    try:
        context = open_run(options.run)
        run = context.run
        out = Path(options.out or Path(run.local) / "rl")
        trained = {method: trained_policy(method, run, out / method, options) for method in options.methods}
        metrics = compare(context, {method: out / method for method in options.methods})
    except ValueError as error:
        print(f"maxmin_rlhf: {error}", file=sys.stderr)
        return 1
    costs = {**mpo_costs(context), **{method: rl_cost(result) for method, result in trained.items()}}
    result = {"run": run.root, "costs": costs, "training": trained, "metrics": metrics.as_json()}
    (out / "comparison.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    write_curves(out / "curves.png", trained)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(quality_table(metrics), cost_table(costs))
    for method, training in trained.items():
        print(f"{method}: {ending(training)}")
    print(f"{out}/comparison.json\n{out}/curves.png")
    return 0


def open_run(directory: str) -> Context:
    """A run that has policies, a fit and an evaluation. Raises RunError that says what it lacks."""
    try:
        context = open_context(directory)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RunError(
            f"{directory}/config.yaml was written by another version of mpo_ray ({place}: {first['msg']}). Do the run "
            "anew."
        ) from error
    run = context.run
    for node in ("prompts/fit", "prompts/evaluation", "samples", "fit.json", "evaluation/completions.parquet"):
        if not run.exists(node):
            raise RunError(f"{run.root} has no {node}: it is not finished. `mpo-ray run CONFIG` goes on with it.")
    return context


# ---- training --------------------------------------------------------------------------------------------------


def trained_policy(method: str, run: Run, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train in a process of its own, unless `out` holds a policy trained with the same settings."""
    names = ("reward", "beta", "steps", "seconds", "window", "batch_size", "group_size", "learning_rate")
    names += ("max_new_tokens", "reference_samples", "pairs", "threads")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    settings = {"run": run.root, "method": method, **given}
    record = out / "training.json"
    if record.is_file():
        done: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if done["settings"] == settings:
            print(f"{method}: trained already with these settings, in {out}", file=sys.stderr)
            return done
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("rl_training.py")), f"--out={out}"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    child = subprocess.run(
        command,
        env={"OMP_NUM_THREADS": str(options.threads), **KEEP_MEMORY, **os.environ},
        stdout=2,  # progress is not the result: to where errors go
        check=False,
    )
    if child.returncode:
        raise RunError(f"the training of {method} ended with status {child.returncode}; its own words are above.")
    result = {**json.loads(record.read_text(encoding="utf-8")), "settings": settings}
    record.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def ending(training: Mapping[str, Any]) -> str:
    """Why a training ended, in a sentence."""
    rate = f"{training['updates']} updates of {training['completions_per_update']} completions, β {training['beta']:g}"
    if training["plateaued"]:
        return f"{rate}; J no longer rose."
    return f"{rate}; it ended by --steps or --seconds while J may still have been rising: more would help it."


# ---- the same evaluation ---------------------------------------------------------------------------------------


def compare(context: Context, policies: Mapping[str, Path]) -> Metrics:
    """The run's completions and those of the new policies in one evaluation: the same prompts, rewards and draws."""
    config, run = context.config, context.run
    objectives = list(config.objectives)
    columns = [*COLUMNS, *(f"reward_{name}" for name in objectives)]
    tables = [run.read_table("evaluation/completions.parquet").select(columns)]
    for name, path in policies.items():
        drawn = completions(context, name, path).select(columns)
        tables.append(drawn.cast(tables[0].schema))
    evaluation = config.evaluation
    return evaluate_completions(
        pa.concat_tables(tables),
        objectives,
        draws=evaluation.bootstrap_draws,
        confidence=evaluation.confidence,
        seed=config.seed,
    )


def completions(context: Context, name: str, path: Path) -> pa.Table:
    """What the evaluation stage makes of a candidate, in this process: completions, rewards, KL."""
    base, evaluation, actors = context.reference(), context.config.evaluation, context.config.scoring
    rendering, specs = load_rendering(base, **context.config.data.rendering), context.rewards()
    rewards = load_rewards(specs, actors)
    judges: Ensemble | None = None
    if IMPLICIT in specs.values():
        judges = Ensemble(base, context.policies(), precision=actors.precision)
    policy, reference = load_policy(str(path), base), load_model(base)
    sampler = MixtureSampler(mixture_of_one(name, policy), room_of(actors))
    recipe = sampling_recipe({name: 1.0}, max_new_tokens=evaluation.max_new_tokens, temperature=evaluation.temperature)
    tables = []
    for index, part in enumerate(context.run.parts("prompts/evaluation")):
        rows = draw(
            sampler,
            recipe,
            rendering,
            context.run.read_table(part),
            num=evaluation.completions_per_prompt,
            seed=int(digest([context.config.seed, name, index])[:12], 16),
        )
        pad = rendering.tokenizer.pad_token_id
        kl, log_z = divergences(policy, reference, sequences(rows), batch_size=actors.batch_size, pad_id=pad)
        ratios = {} if judges is None else log_ratios(judges, list(specs), rows, actors, pad)
        rows = with_rewards(rows, rewards, rendering, ratios, context.config.policies.beta)
        lengths = [len(ids) for ids in rows["response_ids"].to_pylist()]
        rows = rows.append_column("candidate", pa.array([name] * rows.num_rows))
        rows = rows.append_column("num_tokens", pa.array(lengths, pa.int32()))
        rows = rows.append_column("kl", pa.array(kl, pa.float64()))
        tables.append(rows.append_column("log_z", pa.array(log_z, pa.float64())))
    return pa.concat_tables(tables).rename_columns({"sample_id": "completion_id"})


# ---- costs -----------------------------------------------------------------------------------------------------


def mpo_costs(context: Context) -> dict[str, dict[str, float | None]]:
    """Wall time of MPO's stages from the manifest, processor-seconds from costs.json where it is, generated tokens."""
    stages, measured = context.run.manifest()["stages"], context.run.read_json(COSTS) or {}
    tokens = generated_tokens(context)
    costs: dict[str, dict[str, float | None]] = {}
    for row, names in STAGES.items():
        processor = [measured[name]["processor_seconds"] for name in names if name in measured]
        costs[row] = {
            "processor_seconds": sum(processor) if len(processor) == len(names) else None,
            "generated_tokens": tokens,
            "seconds": sum(stages[name]["seconds"] for name in names),
        }
    return costs


def generated_tokens(context: Context) -> float:
    """Tokens of the samples, and of what a fit on decoded completions drew (at the samples' mean length)."""
    config, run = context.config, context.run
    lengths = [len(ids) for ids in run.read_table("samples")["response_ids"].to_pylist()]
    fitted = run.read_json("fit.json").get("decoded") or {"steps": []}
    steps = config.fit.decoded
    drawn = len(fitted["steps"]) * min(steps.num_prompts, config.samples.num_prompts) * steps.completions_per_prompt
    return float(sum(lengths) + drawn * np.mean(lengths))


def rl_cost(training: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: training[name] for name in ("processor_seconds", "generated_tokens", "seconds")}


# ---- tables ----------------------------------------------------------------------------------------------------


def quality_table(metrics: Metrics) -> Table:
    table = _table("win rate against the reference", [*metrics.objectives, "minimum", "KL, nats", "tokens"])
    for name, candidate in metrics.candidates.items():
        wins = [written(candidate.win_rates[objective]) for objective in metrics.objectives]
        minimum = written(candidate.minimum_win_rate)
        table.add_row(metrics.label(name), *wins, minimum, number(candidate.kl.value), number(candidate.num_tokens, 1))
    return table


def cost_table(costs: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Costs of each row, and its processor-seconds as a share of each RL method's."""
    against = [name for name in METHODS if name in costs]
    table = _table("cost", ["processor-seconds", "generated tokens", "wall, s", *(f"of {name}'s" for name in against)])
    for name, cost in costs.items():
        used = cost["processor_seconds"]
        shares = ["" if used is None else f"{used / (costs[other]['processor_seconds'] or 1):.2f}" for other in against]
        shown = "not measured" if used is None else f"{used:,.0f}"
        table.add_row(name, shown, f"{cost['generated_tokens']:,.0f}", f"{cost['seconds']:,.0f}", *shares)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


if __name__ == "__main__":
    sys.exit(main())
