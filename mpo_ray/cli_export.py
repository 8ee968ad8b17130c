"""The verb `export` with --merge or --distill: one plain model in the place of a mixture that is there."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpo_ray.cli_generate import add_mixture_arguments, check_seed, read_prompt_file, recipe_of
from mpo_ray.records import parse_weights

if TYPE_CHECKING:
    from mpo_ray.data.prompts import PlacedPrompt

HELDOUT_SHARE = 0.1


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--merge", choices=("soup",), help="average the policies' parameters; that is not the mixture")
    kind.add_argument("--distill", action="store_true", help="train one policy on the mixture's token distributions")
    before = {action.dest for action in parser._actions}
    add_mixture_arguments(parser)
    group = parser.add_argument_group(
        "with --merge or --distill (CONFIG is a run file, a run directory or an artefact)"
    )
    group.add_argument("--out", metavar="DIR", help="where the model goes")
    group.add_argument("--prompts", metavar="FILE", help="to distil on; the run's own if absent")
    group.add_argument(
        "--heldout-share", type=float, help=f"of FILE's prompts, to measure on; {HELDOUT_SHARE} if absent"
    )
    group.add_argument("--completions-per-prompt", type=int, help="to distil on; 4 if absent")
    group.add_argument("--steps", type=int, help="of the optimiser; 200 if absent")
    group.add_argument("--learning-rate", type=float, help="0.0002 if absent")
    group.add_argument("--rank", type=int, help="of the student's LoRA adapter; the sum of the policies' if absent")
    group.add_argument("--batch-size", type=int, help="completions of a step; 16 if absent")
    group.add_argument("--micro-batch-size", type=int, help="completions of a forward pass; 8 if absent")
    group.add_argument(
        "--max-num-seqs", "--num-lanes", type=int, help="completions that are drawn side by side; 16 if absent"
    )
    defaults = {action.dest: action.default for action in parser._actions if action.dest not in before}
    parser.set_defaults(of_plain_model=defaults)


def check_export(options: argparse.Namespace) -> None:
    """Refuse options that would have no effect, and the lack of --out. Raises ValueError."""
    given = [name for name, default in options.of_plain_model.items() if getattr(options, name) != default]
    if options.merge is not None:
        wrong = [name for name in given if name not in ("weights", "out")]
    else:
        wrong = [] if options.distill else given
    if wrong:
        goes_with = (
            "--distill" if options.merge is not None or wrong[0] not in ("weights", "out") else "--merge or --distill"
        )
        raise ValueError(f"--{wrong[0].replace('_', '-')} goes with {goes_with}; leave it out.")
    if (options.merge is not None or options.distill) and options.out is None:
        raise ValueError("--out DIR is missing: where the model goes.")


def export(options: argparse.Namespace, directory: str, artefact: str) -> int:
    """Write the plain model, and say what it is. directory: the run's, or the artefact itself"""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # PEFT imports DeepSpeed, which would warn of it
    out = Path(options.out)
    if options.merge is not None:
        from mpo_ray.policies.plain_model import write_soup

        result = write_soup(
            Path(artefact), out, None if options.weights is None else parse_weights(options.weights, where="--weights")
        )
        text = result["is"]
    else:
        result = _distil(options, directory, artefact, out)
        text = f"{result['is']}\n{_figures(result)}"
    place = str(out.absolute())
    print(json.dumps({"out": place, **result}) if options.json else f"{text}\n{place}")
    return 0


def _distil(options: argparse.Namespace, directory: str, artefact: str, out: Path) -> dict[str, Any]:
    from rich.console import Console

    from mpo_ray.cluster.progress import bars
    from mpo_ray.out_of_memory import memory_told
    from mpo_ray.stages.distilling import Schooling, distil

    check_seed(options.seed)
    given = {field.name: getattr(options, field.name) for field in fields(Schooling)}
    schooling = Schooling(**{name: value for name, value in given.items() if value is not None})
    prompts = _prompts(options, directory)
    recipe = recipe_of(options, artefact)
    remedy = (
        f"Lower --micro-batch-size (now {schooling.micro_batch_size}), --max-num-seqs (now {schooling.max_num_seqs}) "
        "or --max-tokens."
    )
    with bars(Console(stderr=True, highlight=False)) as shown, memory_told("distillation", remedy):

        def show(title: str, done: int, total: int, figures: Mapping[str, float]) -> None:
            shown.show(title, done, total, dict(figures))

        return distil(artefact, out, prompts, recipe, schooling, seed=options.seed, show=show)


def _prompts(options: argparse.Namespace, directory: str) -> tuple[list[PlacedPrompt], list[PlacedPrompt]]:
    """To distil on, and to measure on: the file's, or else the run's."""
    from mpo_ray.run import Run
    from mpo_ray.stages.distilling import run_prompts, split_prompts

    if options.prompts is not None:
        share = HELDOUT_SHARE if options.heldout_share is None else options.heldout_share
        if not 0 < share < 1:
            raise ValueError(f"--heldout-share {share:g}: it lies between 0 and 1.")
        return split_prompts(read_prompt_file(options.prompts), share=share, seed=options.seed)
    if options.heldout_share is not None:
        raise ValueError("--heldout-share goes with --prompts; a run holds its evaluation's prompts out.")
    if (Path(directory) / "policies").is_dir() and not (Path(directory) / "config.yaml").exists():
        raise ValueError(f"{directory} is an artefact without prompts: name some to distil on with --prompts FILE.")
    return run_prompts(Run.at(directory))


def _figures(record: Mapping[str, Any]) -> str:
    """What remains, as a table of three lines."""
    names = {"reference": "the reference", "before": "the average of the parameters", "after": "this policy"}
    lines = ["KL(mixture ‖ model) on held-out prompts, nats per token [95 % interval over prompts]"]
    for key, name in names.items():
        value, low, high = record[key]["per_token"]
        lines.append(f"  {name:<30} {value:.3g} [{low:.3g}, {high:.3g}]")
    return "\n".join(lines)
