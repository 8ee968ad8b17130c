"""NAME=VALUE and paths, as they are written at the command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

#: Options and arguments of any verb that are paths, or lists of them.
PATHS = ("config", "directory", "out", "prompts", "table", "reference")


def parse_named(texts: Iterable[str], option: str, form: str) -> dict[str, str]:
    """Read NAME=VALUE texts, each name once; option and form are for the message. Raises ValueError."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name in found:
            raise ValueError(f"{option} {text!r}: write {form}.")
        found[name] = value
    return found


def expand_paths(options: argparse.Namespace) -> None:
    """Put the home directory in the place of a path's `~`: a shell leaves it in --out=~/x. Raises ValueError."""
    from mpo_ray.home import expand_home

    for name in PATHS:
        value = getattr(options, name, None)
        if value is not None:
            setattr(options, name, expand_home(value) if isinstance(value, str) else [expand_home(v) for v in value])
