"""`mpo-ray`: one command, a verb per stage (design 5.4).

What a verb needs is imported by the function that does it, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's own notes that mean nothing to a user: many worker processes on few cores, and details of actor restarts.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started on node")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

from mpo_ray import cli_engine, cli_export, cli_generate, cli_tables
from mpo_ray.cli_values import expand_paths, parse_named
from mpo_ray.records import parse_weights
from mpo_ray.waiting import told_if_slow

if TYPE_CHECKING:
    from rich.console import Console

    from mpo_ray.config import RunConfig
    from mpo_ray.config_serving import Serve
    from mpo_ray.run import Run
    from mpo_ray.stages.stage import Context

#: Verbs that do stages of a run, with the stages they do.
STAGE_VERBS = {
    "data": ("embedded", "data"),
    "reference": ("reference",),
    "train": ("reference", "pairs", "policies"),
    "sample": ("samples",),
    "score": ("scores",),
    "fit": ("fit",),
    "export": ("mixture",),
    "mopo": ("pool", "mopo"),
    "evaluate": ("evaluation", "certificates", "judge"),
    "report": ("report",),
}
HELP = {
    "data": "read, check and split the preferences",
    "reference": "fine-tune the reference model",
    "train": "train the reference, where the config says so, and one policy per objective",
    "sample": "draw responses of the reference and the policies for the fit",
    "score": "score the samples under every policy and reward",
    "fit": "fit the mixture weights",
    "export": "write the mixture artefact, or one plain model in its place",
    "mopo": "train one policy for a primary objective with bounds on the others, or solve a pool of your own",
    "evaluate": "compare reference, policies and mixtures on held-out prompts",
    "report": "write report.html",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status, 0 only if the result is there."""
    options = _parser().parse_args(arguments)
    from mpo_ray.run import StageError

    try:
        expand_paths(options)
        return int(options.run(options) or 0)
    except (ValueError, OSError, StageError) as error:
        # What a user can cause says what to do; a traceback would hide it. A Ray worker's error carries its own.
        text = str(getattr(error, "cause", None) or error)
        if options.json:
            print(json.dumps({"error": text}))
        print(f"mpo-ray {options.verb}: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"mpo-ray {options.verb}: interrupted; what was complete is kept.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mpo-ray", description=__doc__.partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)

    def add(verb: str, function: object, text: str, *, config: bool = True) -> argparse.ArgumentParser:
        sub = verbs.add_parser(verb, help=text, description=text)
        sub.set_defaults(run=function)
        sub.add_argument("--json", action="store_true", help="print a machine-readable result")
        if config:
            # These may do without a run file: then they have a table.
            sub.add_argument("config", nargs="?" if verb in ("fit", "mopo") else None, help="run file (YAML)")
            sub.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", dest="overrides")
            sub.add_argument("--update", action="store_true", help="let this config replace the one the run began with")
            sub.add_argument("--address", help="Ray cluster to join; a local Ray is started without one")
        return sub

    add("run", _run, "do every stage that is not complete")
    check = add("check", _check, "look for what would stop a run, and what it will take, before anything is paid for")
    check.add_argument("--no-timing", action="store_true", help="estimate memory and disk alone; time nothing")
    for verb, text in HELP.items():
        if verb not in ("fit", "mopo", "export"):
            add(verb, _stage, text)
    cli_export.add_export_arguments(add("export", _export, HELP["export"]))
    cli_tables.add_fit_arguments(add("fit", _fit, HELP["fit"]))
    cli_tables.add_mopo_arguments(add("mopo", _mopo, HELP["mopo"]))
    mix = add("mix", _mix, "put policies that are trained into a mixture artefact", config=False)
    mix.add_argument("policies", nargs="+", metavar="NAME=DIR", help="LoRA adapters or whole models, MOPO's among them")
    mix.add_argument("--reference", required=True, help="what they were trained from: a directory or a hub id")
    mix.add_argument("--weights", help="NAME=VALUE,… ; even if absent")
    mix.add_argument("--out", required=True, metavar="DIR", help="where the artefact goes")
    cli_generate.add_generate_arguments(
        add("generate", _generate, "answer a prompt, or a file of prompts, from the mixture", config=False)
    )
    add("families", _families, "list the families of models that are under test, and how each is run", config=False)
    serve = add("serve", _serve, "serve the mixture behind an OpenAI-compatible URL", config=False)
    serve.add_argument("directory", help="run directory or mixture artefact")
    serve.add_argument("--host")
    serve.add_argument("--port", type=int)
    cli_engine.add_engine_arguments(serve)
    return parser


def run_job(*verbs: str) -> int:
    """The entry point of the files in `jobs/`: the verbs, one after the other, on the config that `--config` names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True, help="run file (YAML)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", dest="overrides")
    parser.add_argument("--update", action="store_true", help="let this config replace the one the run began with")
    given = parser.parse_args()
    rest = [given.config, *(f"--set={item}" for item in given.overrides), *(["--update"] if given.update else [])]
    return next((status for verb in verbs if (status := main([verb, *rest]))), 0)


def _run(options: argparse.Namespace) -> int:
    from mpo_ray.stages.evaluating import show_summary
    from mpo_ray.stages.pipeline import run_pipeline

    with _opened(options) as context:
        run_pipeline(context)
    run = context.run
    if options.json:
        print(json.dumps(_result(run)))
    else:
        show_summary(context)
    return 0


def _stage(options: argparse.Namespace) -> int:
    from mpo_ray.stages.pipeline import run_single

    with _opened(options) as context:
        last = run_single(context, *STAGE_VERBS[options.verb])
    run = context.run
    record = run.manifest()["stages"].get(last, {"outputs": [last]})
    if options.json:
        print(json.dumps({"run": run.root, **{key: value for key, value in record.items() if key != "files"}}))
    else:
        print("\n".join(f"{run.root}/{node}" for node in record["outputs"]))
    return 0


def _fit(options: argparse.Namespace) -> int:
    cli_tables.check_source(
        options, "give a run file, or a score table of your own with --table FILE --out DIR; one of the two."
    )
    if options.at is not None:
        return cli_tables.predict(options)
    return _stage(options) if options.config is not None else cli_tables.fit(options)


def _mopo(options: argparse.Namespace) -> int:
    cli_tables.check_source(
        options, "give a run file, or a pool of your own with --table FILE --primary NAME --out DIR; one of the two."
    )
    return _stage(options) if options.config is not None else cli_tables.mopo(options)


def _check(options: argparse.Namespace) -> int:
    from mpo_ray.cluster.session import ray_session
    from mpo_ray.stages.check import check_run

    config = _config(options)
    with ray_session(options.address):
        findings = check_run(config, _console(), update=options.update, timing=not options.no_timing)
    if options.json:
        print(json.dumps(findings.as_json()))
    else:
        print(findings.as_text())
    return 1 if findings.problems else 0


def _mix(options: argparse.Namespace) -> int:
    import torch

    from mpo_ray.config import NAME
    from mpo_ray.home import expand_home

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # PEFT imports DeepSpeed, which would print of it
    from mpo_ray.policies.artefact import write_artefact
    from mpo_ray.policies.plain_model import written_whole

    policies = parse_named(options.policies, "policies", "NAME=DIR, once for each policy")
    for name in policies:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r}: names are letters, digits, - and _.")
    given = None if options.weights is None else parse_weights(options.weights, where="--weights")
    notes: list[str] = []
    out = Path(options.out)
    with written_whole(out) as directory:
        config = write_artefact(
            directory,
            objectives={name: expand_home(policy) for name, policy in policies.items()},
            reference=options.reference,
            copy_reference=False,
            weights=dict.fromkeys(policies, 1.0 / len(policies)) if given is None else given,
            fit={},
            tell=notes.append,
        )
    place = str(out.absolute())
    told = {"out": place, "weights": config.weights, "notes": notes}
    print(json.dumps(told) if options.json else "\n".join([*notes, place]))
    return 0


def _families(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from mpo_ray.policies.families import FAMILIES, as_text

    print(json.dumps([asdict(family) for family in FAMILIES]) if options.json else as_text())
    return 0


def _generate(options: argparse.Namespace) -> int:
    artefact, _, stored = _artefact(options.directory)
    return cli_generate.generate(options, artefact, cli_engine.engine_settings(options, stored))


def _export(options: argparse.Namespace) -> int:
    from mpo_ray.run import Run

    cli_export.check_export(options)
    if options.merge is None and not options.distill:
        return _stage(options)
    config = Path(options.config)
    given = _config(options) if config.is_file() else None
    directory = options.config if given is None else Run.check(given, update=options.update).root
    return cli_export.export(options, directory, _artefact(directory)[0])


def _serve(options: argparse.Namespace) -> int:
    from mpo_ray.serving.haproxy import haproxy_environment

    if not os.environ.get("RAY_ADDRESS"):
        os.environ.update(haproxy_environment())
    from mpo_ray.serving.service import serve_endpoint

    artefact, name, serve = _artefact(options.directory)
    given = {key: getattr(options, key) for key in ("host", "port") if getattr(options, key) is not None}
    settings = cli_engine.engine_settings(options, serve)
    serve_endpoint(artefact, settings.model_copy(update=given), name, blocking=True)
    return 0


def _artefact(directory: str) -> tuple[str, str, Serve]:
    """The mixture's directory, the name it is served under, and how: from a run directory or an artefact alone."""
    from mpo_ray.config import RunConfig
    from mpo_ray.config_serving import Serve
    from mpo_ray.run import Run

    if (Path(directory) / "policies").is_dir() and not (Path(directory) / "config.yaml").exists():
        return directory, Path(directory).absolute().name, Serve()
    run = Run.at(directory)
    stored = RunConfig.model_validate(run.read_config())
    return str(run.fetch("mixture")), stored.name, stored.serve


def _config(options: argparse.Namespace) -> RunConfig:
    from mpo_ray.run_file import load_config

    return load_config(options.config, options.overrides)


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextmanager
def _opened(options: argparse.Namespace) -> Iterator[Context]:
    """The run of a config on a Ray cluster, after what can be checked at once: resources, storage, models, rewards.

    Another command on the run is refused meanwhile. A report needs no such thing: while another command works, it is
    written from what is complete, and not recorded.
    """
    with told_if_slow("loading Ray, torch and transformers"):
        from mpo_ray.cluster.preflight import check_placement, check_storage_everywhere
        from mpo_ray.cluster.session import ray_session
        from mpo_ray.run import Run
        from mpo_ray.run_lock import LockedError, locked
        from mpo_ray.stages.check import check_compared_models, check_model, check_rewards, check_run_engine
        from mpo_ray.stages.judging import check_judge_settings
        from mpo_ray.stages.stage import Context

    config, console = _config(options), _console()
    run = Run.check(config, update=options.update)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(run, f"mpo-ray {options.verb}", say=console.print))
        except LockedError:
            if options.verb != "report":
                raise
            context = Context(config, run, console, recorded=False)
        else:
            run.begin(config)
            context = Context(config, run, console)
        check_model(context)
        check_compared_models(context)
        check_rewards(context)
        check_judge_settings(context)
        check_run_engine(config)
        stack.enter_context(ray_session(options.address))
        check_placement(config)
        check_storage_everywhere(run)
        yield context


def _result(run: Run) -> dict[str, object]:
    return {
        "run": run.root,
        "weights": run.read_json("fit.json")["weights"],
        "metrics": run.read_json("evaluation/metrics.json"),
        "report": f"{run.root}/report/report.html",
    }
