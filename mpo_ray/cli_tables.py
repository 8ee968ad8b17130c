"""The verbs `fit` and `mopo` on a table of one's own, without a run; and `fit --at`, for one λ."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console, RenderableType

from mpo_ray.cli_values import parse_named, parse_weights
from mpo_ray.config import Fit
from mpo_ray.records import Bound, check_weights
from mpo_ray.run import Run
from mpo_ray.run_file import load_config, parse_settings


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--at", metavar="NAME=λ,…", help="predict the trade-off at one λ instead of fitting")
    table = parser.add_argument_group("a score table of your own, in the place of a run file")
    table.add_argument("--table", nargs="+", metavar="FILE", help="Parquet, CSV or JSON Lines; globs and URLs too")
    table.add_argument("--out", metavar="DIR", help="where fit.json, trade_off.json and their pictures go")
    table.add_argument("--method", choices=("exact", "bsmd", "fixed"), help="default: exact, or fixed with --weights")
    table.add_argument("--estimator", choices=("balanced", "paper"), default="balanced")
    table.add_argument("--weights", metavar="NAME=λ,…", help="λ for --method fixed")
    table.add_argument("--steps", type=int, help="T of --method bsmd")
    table.add_argument("--bootstrap-draws", type=int, default=200, help="for the intervals; 0 for none")
    table.add_argument("--seed", type=int, default=0)


def add_mopo_arguments(parser: argparse.ArgumentParser) -> None:
    table = parser.add_argument_group("a pool of your own, in the place of a run file")
    table.add_argument("--table", nargs="+", metavar="FILE", help="Parquet, CSV or JSON Lines; globs too")
    table.add_argument("--primary", metavar="NAME", help="the objective that is maximised")
    table.add_argument(
        "--bound",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="the least win probability of another objective: 0.55, or `reference - 0.02`; once for each",
    )
    table.add_argument("--tau", type=float, default=0.08, help="strength of the KL penalty, win probability per nat")
    table.add_argument("--radius", type=float, default=0.0, help="of the robust bounds, nats; 0 for none")
    table.add_argument("--variant", choices=("lagrangian", "barrier"), default="lagrangian")
    table.add_argument("--sigma", type=float, help="strength of the barrier; 0.01 if absent")
    table.add_argument("--out", metavar="DIR", help="where mopo.json and ratio.parquet go")


def fit(options: argparse.Namespace) -> int:
    """Fit the weights of a score table, and write what is known of them."""
    if options.out is None:
        raise ValueError("--out DIR is missing: where fit.json, trade_off.json and their pictures go.")
    from mpo_ray.fitting.standalone import fit_file
    from mpo_ray.fitting.summary import fit_summary

    result = fit_file(options.table, Path(options.out), _table_settings(options), seed=options.seed)
    if options.json:
        print(json.dumps({"out": str(Path(options.out).absolute()), **result}))
    else:
        _show(fit_summary(result))
        print("\n".join(str(path) for path in sorted(Path(options.out).absolute().iterdir())))
    return 0


def mopo(options: argparse.Namespace) -> int:
    """Solve a pool, and write its optimum."""
    from mpo_ray.fitting.pool_solution import pool_summary, solve_file

    for name in ("primary", "out"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name} is missing: a pool of your own needs --primary NAME and --out DIR.")
    bounds = parse_named(options.bound, "--bound", "NAME=VALUE, once for each objective")
    out = Path(options.out)
    result = solve_file(
        options.table,
        out,
        primary=options.primary,
        bounds={name: Bound.parse(name, value) for name, value in bounds.items()},
        tau=options.tau,
        radius=options.radius,
        variant=options.variant,
        sigma=options.sigma,
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

    if options.table is not None:
        settings, seed, scores = _table_settings(options), options.seed, open_scores(options.table)
    else:
        config = load_config(options.config, options.overrides)
        run, settings, seed = Run.check(config, update=options.update), config.fit, config.seed
        if not run.parts("scores"):
            raise ValueError(f"{run.root} has no scores yet; `mpo-ray run {options.config}` makes them.")
        scores = scores_from_table(run.read_table("scores"), list(config.objectives), min_objectives=1)
    weights = check_weights(parse_weights(options.at, "--at") or {}, list(scores.objectives), where="--at")
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
    weights = parse_weights(options.weights, "--weights")
    given = {
        "method": options.method or ("exact" if weights is None else "fixed"),
        "estimator": options.estimator,
        "weights": weights,
        "bootstrap_draws": options.bootstrap_draws,
        **({} if options.steps is None else {"bsmd": {"steps": options.steps}}),
    }
    return parse_settings(Fit, given, "fit")


def _show(what: RenderableType) -> None:
    Console(highlight=False, width=None if sys.stdout.isatty() else 100).print(what)
