"""Options of the verbs that open an engine: how much memory it takes, and in which precision it computes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpo_ray.config_serving import Serve

#: Options that are settings of `serve` by another name.
_SHORT = ("kv_cache_gib", "context", "precision")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the engine")
    group.add_argument(
        "--set", action="append", default=[], metavar="serve.KEY=VALUE", dest="overrides", help="any setting of `serve`"
    )
    group.add_argument("--kv-cache-gib", type=float, metavar="GIB", help="memory of the KV cache; a share if absent")
    group.add_argument("--context", type=int, metavar="TOKENS", help="of a sequence, at most; the model's if absent")
    group.add_argument("--precision", help="fp32, bf16, fp16 or auto: the artefact's, or fp32 on a CPU slower in it")


def engine_settings(options: argparse.Namespace, stored: Serve) -> Serve:
    """The settings that were stored with the artefact, with what the options change. Raises ConfigError."""
    from mpo_ray.config import ConfigError
    from mpo_ray.config_serving import Serve
    from mpo_ray.run_file import apply_override, parse_settings

    values = {"serve": stored.model_dump(exclude_unset=True)}
    for override in options.overrides:
        if not override.startswith("serve."):
            raise ConfigError(f"--set {override!r}: only settings of `serve` count here; write serve.KEY=VALUE.")
        apply_override(values, override)
    given = {name: getattr(options, name) for name in _SHORT if getattr(options, name) is not None}
    return parse_settings(Serve, values["serve"] | given, "serve")
