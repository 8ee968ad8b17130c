"""The verbs `fit` and `mopo` on a table of one's own, without a run; and `fit --at`, for one λ."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpo_ray.cli_values import parse_named
from mpo_ray.records import parse_weights

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mpo_ray.config import Fit


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--at", metavar="NAME=λ,…", help="predict the trade-off at one λ instead of fitting")
    add = _table_group(parser, "a score table of your own, in the place of a run file")
    add("--table", nargs="+", metavar="FILE", help="Parquet, CSV or JSON Lines; globs and URLs too")
    add("--out", metavar="DIR", help="where fit.json, trade_off.json and their pictures go")
    add("--method", choices=("exact", "bsmd", "fixed"), help="default: exact, or fixed with --weights")
    add("--estimator", choices=("balanced", "paper"), help="default: balanced")
    add("--weights", metavar="NAME=λ,…", help="λ for --method fixed")
    add("--steps", type=int, help="T of --method bsmd")
    add("--bootstrap-draws", type=int, help="for the intervals; 0 for none, 200 if absent")
    add("--seed", type=int, help="0 if absent")


def add_mopo_arguments(parser: argparse.ArgumentParser) -> None:
    add = _table_group(parser, "a pool of your own, in the place of a run file")
    add("--table", nargs="+", metavar="FILE", help="Parquet, CSV or JSON Lines; globs too")
    add("--primary", metavar="NAME", help="the objective that is maximised")
    add(
        "--bound",
        action="append",
        metavar="NAME=VALUE",
        help="the least win probability of another objective: 0.55, or `reference - 0.02`; once for each",
    )
    add("--tau", type=float, help="strength of the KL penalty, win probability per nat; 0.08 if absent")
    add("--radius", type=float, help="of the robust bounds, nats; none if absent")
    add("--variant", choices=("lagrangian", "barrier"), help="default: lagrangian")
    add("--sigma", type=float, help="strength of the barrier; 0.01 if absent")
    add("--out", metavar="DIR", help="where mopo.json and ratio.parquet go")


def _table_group(parser: argparse.ArgumentParser, title: str) -> Callable[..., None]:
    """A group of options that go with a table; returns what adds one. An option that is not given is None."""
    group, names = parser.add_argument_group(title), list[str]()
    parser.set_defaults(of_table=names)

    def add(option: str, **settings: Any) -> None:
        names.append(group.add_argument(option, **settings).dest)

    return add


def check_source(options: argparse.Namespace, what: str) -> None:
    """A run file or a table, each with what goes with it; `what` says which to give. Raises ValueError."""
    if (options.config is None) == (options.table is None):
        raise ValueError(what)
    of_table = [f"--{name.replace('_', '-')}" for name in _given(options, *options.of_table)]
    if options.config is not None and of_table:
        raise ValueError(
            f"{of_table[0]} goes with --table. A run takes its settings from the run file: write it there, or give "
            "--set KEY.PATH=VALUE."
        )
    of_run = {"--set": options.overrides, "--update": options.update, "--address": options.address}
    for option, value in of_run.items():
        if options.config is None and value:
            raise ValueError(f"{option} goes with a run file; with --table, leave it out.")


def fit(options: argparse.Namespace) -> int:
    """Fit the weights of a score table, and write what is known of them."""
    if options.out is None:
        raise ValueError("--out DIR is missing: where fit.json, trade_off.json and their pictures go.")
    from mpo_ray.fitting.standalone import fit_file
    from mpo_ray.fitting.summary import fit_summary

    result = fit_file(options.table, Path(options.out), _table_settings(options), **_given(options, "seed"))
    if options.json:
        print(json.dumps({"out": str(Path(options.out).absolute()), **result}))
    else:
        _show(fit_summary(result))
        print("\n".join(str(path) for path in sorted(Path(options.out).absolute().iterdir())))
    return 0


def mopo(options: argparse.Namespace) -> int:
    """Solve a pool, and write its optimum."""
    from mpo_ray.fitting.pool_solution import pool_summary, solve_file
    from mpo_ray.records import Bound

    for name in ("primary", "out"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name} is missing: a pool of your own needs --primary NAME and --out DIR.")
    bounds = parse_named(options.bound or [], "--bound", "NAME=VALUE, once for each objective")
    out = Path(options.out)
    result = solve_file(
        options.table,
        out,
        primary=options.primary,
        bounds={name: Bound.parse(name, value) for name, value in bounds.items()},
        **_given(options, "tau", "radius", "variant", "sigma"),
    )
    if options.json:
        print(json.dumps({"out": str(out.absolute()), **result}))
    else:
        _show(pool_summary(result))
        print(f"{out.absolute()}/mopo.json\n{out.absolute()}/ratio.parquet")
    return 0


def predict(options: argparse.Namespace) -> int:
    """The predicted trade-off at the λ of --at, from a run's scores or a table."""
    from mpo_ray.data.scores import open_scores, scores_from_table
    from mpo_ray.fitting.standalone import usable_estimator
    from mpo_ray.fitting.summary import trade_off_table
    from mpo_ray.fitting.trade_off import predict_trade_off
    from mpo_ray.records import check_weights
    from mpo_ray.run import Run
    from mpo_ray.run_file import load_config

    if options.table is not None:
        settings, seed, scores = _table_settings(options), options.seed or 0, open_scores(options.table)
    else:
        config = load_config(options.config, options.overrides)
        run, settings, seed = Run.check(config, update=options.update), config.fit, config.seed
        if not run.parts("scores"):
            raise ValueError(f"{run.root} has no scores yet; `mpo-ray run {options.config}` makes them.")
        scores = scores_from_table(run.read_table("scores"), list(config.objectives), min_objectives=1)
    weights = check_weights(parse_weights(options.at, where="--at"), list(scores.objectives), where="--at")
    result = predict_trade_off(
        scores,
        [weights],
        estimator=usable_estimator(scores, settings.estimator),
        draws=settings.bootstrap_draws,
        confidence=settings.confidence,
        seed=seed,
    )
    if options.json:
        print(json.dumps(result))
    else:
        _show(trade_off_table(result))
    return 0


def _table_settings(options: argparse.Namespace) -> Fit:
    """The fit's settings from the command line, checked as a run file's are."""
    from mpo_ray.config import Fit
    from mpo_ray.run_file import parse_settings

    weights = None if options.weights is None else parse_weights(options.weights, where="--weights")
    given = {
        "method": options.method or ("exact" if weights is None else "fixed"),
        "weights": weights,
        **_given(options, "estimator", "bootstrap_draws"),
        **({} if options.steps is None else {"bsmd": {"steps": options.steps}}),
    }
    return parse_settings(Fit, given, "fit")


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the options that are given; what is not has its default where it is used."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _show(what: RenderableType) -> None:
    from rich.console import Console

    Console(highlight=False, width=None if sys.stdout.isatty() else 100).print(what)
