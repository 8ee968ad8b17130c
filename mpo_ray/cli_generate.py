"""The verb `generate`: completions of a mixture, for one prompt or a file of them; and which mixture is meant."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpo_ray.cli_engine import add_engine_arguments
from mpo_ray.records import parse_weights

if TYPE_CHECKING:
    from mpo_ray.config_serving import Serve
    from mpo_ray.data.prompts import PlacedPrompt
    from mpo_ray.decoding.offline import Completion, Recipe
    from mpo_ray.decoding.protocol import Mode

#: Particles of sequential Monte Carlo, or attempts side by side, where an exact mode is asked for without a number.
PARTICLES = 16
#: Tokens of a completion, where nothing else is asked for.
MAX_TOKENS = 128


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", help="run directory or mixture artefact")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one prompt; a user's message where the tokenizer has a chat template")
    what.add_argument("--prompts", metavar="FILE", help="JSONL, JSON, CSV or Parquet rows with `prompt`, or lines .txt")
    parser.add_argument("--n", type=int, default=1, help="completions of each prompt")
    add_mixture_arguments(parser)
    add_engine_arguments(parser)
    draw = parser.add_argument_group("how tokens are drawn")
    draw.add_argument("--temperature", type=float, default=1.0, help="0 for the likeliest tokens")
    draw.add_argument("--top-p", type=float, default=1.0)
    draw.add_argument("--top-k", type=int, default=0)
    draw.add_argument("--min-p", type=float, default=0.0)
    draw.add_argument("--repetition-penalty", type=float, default=1.0)
    draw.add_argument("--presence-penalty", type=float, default=0.0)
    draw.add_argument("--frequency-penalty", type=float, default=0.0)
    draw.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a completion; once for each")
    group = parser.add_argument_group("with --prompts")
    names = list[str]()
    parser.set_defaults(of_prompts=names)

    def add(option: str, **settings: Any) -> None:
        names.append(group.add_argument(option, **settings).dest)

    add("--out", metavar="DIR", help="where the parts go; FILE's name and -completions if absent")
    add("--jsonl", action="store_true", default=None, help="JSON Lines beside the Parquet files")
    add("--actors", type=int, help="Ray Data actors with an engine each; 1 if absent")
    add("--cpus-per-actor", type=float, help="1 if absent")
    add("--gpus-per-actor", type=float, help="0 if absent")
    add("--lanes", type=int, help="sequences that an engine decodes at a time; serve.max_num_seqs if absent")
    add("--per-part", type=int, help="prompts in a part, the unit of work and resume; 64 if absent")
    add("--address", help="Ray cluster to join; a local Ray is started without one")


def add_mixture_arguments(parser: argparse.ArgumentParser) -> None:
    """Which mixture is decoded."""
    group = parser.add_argument_group("which mixture")
    group.add_argument("--weights", metavar="NAME=λ,…", help="the artefact's own if absent")
    group.add_argument(
        "--mode",
        choices=("token", "exact"),
        help="token by token, or whole sequences; exact with --method, --particles",
    )
    group.add_argument(
        "--method", choices=("smc", "rejection"), help="of --mode exact; sequential Monte Carlo if absent"
    )
    group.add_argument("--particles", type=int, help=f"of --mode exact; {PARTICLES} if absent")
    group.add_argument("--max-attempts", type=int, help="after which rejection gives up; 1000 if absent")
    group.add_argument("--max-tokens", type=int, help=f"{MAX_TOKENS} if absent, or half of the model's context")
    group.add_argument("--seed", type=int, default=0)


def generate(options: argparse.Namespace, artefact: str, serve: Serve) -> int:
    """Print the completions of a prompt, or write those of a file and print where they are. serve: of the engine"""
    if options.n < 1:
        raise ValueError(f"--n {options.n}: ask for 1 completion or more.")
    check_seed(options.seed)
    if options.prompts is not None:
        return _generate_file(options, artefact, serve)
    if given := next((name for name in options.of_prompts if getattr(options, name) is not None), None):
        raise ValueError(f"--{given.replace('_', '-')} goes with --prompts FILE; leave it out for one prompt.")
    from mpo_ray.decoding.answer import answer

    recipe = recipe_of(options, artefact)
    finished = answer(artefact, options.prompt, recipe, num=options.n, seed=options.seed, serve=serve)
    if options.json:
        completions = [_as_json(one) for one in finished]
        print(json.dumps({"text": finished[0].text, "completions": completions}))
    else:
        print("\n\n".join(one.text for one in finished if one.error is None))
    errors = [one.error for one in finished if one.error is not None]
    return _status(len(errors), len(finished), errors[0] if errors else "")


def _generate_file(options: argparse.Namespace, artefact: str, serve: Serve) -> int:
    from rich.console import Console

    from mpo_ray.cluster.generate import generate_parts
    from mpo_ray.cluster.session import ray_session
    from mpo_ray.config import Actors
    from mpo_ray.run_file import parse_settings

    prompts = read_prompt_file(options.prompts)
    given = {
        "num_actors": options.actors,
        "cpus_per_actor": options.cpus_per_actor,
        "gpus_per_actor": options.gpus_per_actor,
        "prompts_per_part": 64 if options.per_part is None else options.per_part,
    }
    actors = parse_settings(Actors, {key: value for key, value in given.items() if value is not None}, "actors")
    if options.lanes is not None:
        if options.lanes < 1:
            raise ValueError(f"--lanes {options.lanes}: an engine needs 1 or more.")
        serve = serve.model_copy(update={"max_num_seqs": options.lanes})
    recipe = recipe_of(options, artefact)
    out = options.out or f"{Path(options.prompts.removesuffix('.gz')).stem}-completions"
    with ray_session(options.address):
        outcome = generate_parts(
            artefact,
            prompts,
            recipe,
            out,
            num_samples=options.n,
            seed=options.seed,
            serve=serve,
            actors=actors,
            jsonl=bool(options.jsonl),
            console=Console(stderr=True, highlight=False),
        )
    place = f"{out if '://' in out else Path(out).absolute()}/{'jsonl' if options.jsonl else 'completions'}"
    print(json.dumps({"out": place, **asdict(outcome)}) if options.json else place)
    total = outcome.num_completions + outcome.num_failed
    return _status(outcome.num_failed, total, "their rows say why, in `error`.")


def _status(num_failed: int, total: int, why: str) -> int:
    """The exit status: 0 only if every completion is there."""
    if num_failed:
        print(f"mpo-ray generate: {num_failed} of {total} completions could not be made: {why}", file=sys.stderr)
    return int(num_failed > 0)


def recipe_of(options: argparse.Namespace, artefact: str) -> Recipe:
    """What the options ask for, with the artefact's weights where they give none. Raises ValueError."""
    from mpo_ray.decoding.offline import Recipe
    from mpo_ray.decoding.protocol import Sampling
    from mpo_ray.policies.mixture_config import MixtureConfig
    from mpo_ray.records import check_weights

    config = MixtureConfig.from_pretrained(artefact)
    weights = None if options.weights is None else parse_weights(options.weights, where="--weights")
    drawn = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    context = config.max_position_embeddings
    usual = MAX_TOKENS if context is None else min(MAX_TOKENS, context // 2)
    sampling = Sampling(
        max_tokens=usual if options.max_tokens is None else options.max_tokens,
        **{name: getattr(options, name) for name in drawn if hasattr(options, name)},
        stop=tuple(getattr(options, "stop", ())),
    )
    checked = config.weights if weights is None else check_weights(weights, config.objectives, where="--weights")
    return Recipe(sampling, _mode(options), checked)


def _mode(options: argparse.Namespace) -> Mode:
    from mpo_ray.decoding.protocol import Mode

    of_exact = {"--method": options.method is not None, "--particles": options.particles not in (None, 1)}
    asked = next((option for option, given in of_exact.items() if given), None)
    if options.mode == "token" and asked is not None:
        raise ValueError(f"{asked} goes with --mode exact, which draws whole sequences.")
    if options.max_attempts is not None and options.method != "rejection":
        raise ValueError("--max-attempts goes with --method rejection.")
    if options.mode != "exact" and asked is None:
        return Mode()
    attempts = {} if options.max_attempts is None else {"max_attempts": options.max_attempts}
    return Mode(options.method or "smc", PARTICLES if options.particles is None else options.particles, **attempts)


def read_prompt_file(path: str) -> list[PlacedPrompt]:
    """The prompts of a file: rows as a run's sources have them, or the lines of a text file. Raises DataError."""
    from mpo_ray.config_training import Source
    from mpo_ray.data.prompts import read_prompt_lines, read_prompt_rows

    is_text = Path(path.removesuffix(".gz")).suffix == ".txt"
    return read_prompt_lines(path) if is_text else read_prompt_rows(Source(path=path))


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**31:
        raise ValueError(f"--seed {seed}: a seed is 0 or more, and below 2147483648.")


def _as_json(completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "diagnostics": None if completion.diagnostics is None else asdict(completion.diagnostics),
        "error": completion.error,
    }
