"""Reading a run file: YAML, environment variables and `--set`, and the errors a wrong one gets."""

from __future__ import annotations

import copy
import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mpo_ray.config import ConfigError, RunConfig

Settings = TypeVar("Settings", bound=BaseModel)

#: Values that a run file may hold once its aliases are written out; the largest in use hold a few hundred.
MOST_VALUES = 100_000


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run file, apply `key.path=value` overrides (YAML values) and check everything.

    `${NAME}` and `${NAME:-default}` in strings are environment variables. Raises ConfigError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give the path of a run file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save the run file as UTF-8.") from None
    return parse_config(_read_yaml(text, str(path)), overrides, where=str(path))


def parse_config(raw: object, overrides: Iterable[str] = (), *, where: str = "config") -> RunConfig:
    """Check a run file's content; see `load_config`."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: a run file is a mapping of keys; this one holds {type(raw).__name__}.")
    values = copy.deepcopy(raw)
    for override in overrides:
        apply_override(values, override)
    return parse_settings(RunConfig, _expand(values, where), where)


def parse_settings(model: type[Settings], values: Mapping[str, Any], where: str) -> Settings:
    """Check values against a part of the schema, or all of it. Raises ConfigError that lists every problem."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = "\n".join("  " + _describe(problem, model) for problem in error.errors())
        raise ConfigError(f"{where}: {error.error_count()} problem(s):\n{problems}") from None


def _read_yaml(text: str, where: str) -> Any:
    """What a YAML text says. Raises ConfigError for one that is none, repeats a key, or would grow without bounds."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and _num_values(root) > MOST_VALUES:
            raise ConfigError(
                f"{where}: with its aliases (*name) written out it holds more than {MOST_VALUES:,} values, or contains "
                "itself; write what you need without aliases of aliases."
            )
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{where}: lists and mappings are nested too deeply; a run file needs 6 levels.") from None
    except ValueError as error:  # such as a date with a thirteenth month
        raise error if isinstance(error, ConfigError) else ConfigError(f"{where}: not valid YAML: {error}") from None
    repeated = _repeated_key(root)
    if repeated is not None:
        line = repeated.start_mark.line + 1
        raise ConfigError(f"{where}, line {line}: the key {repeated.value!r} is there twice; keep one.")
    return raw


def _num_values(root: yaml.Node) -> float:
    """How many nodes a document has once every alias is written out; infinitely many where one holds itself."""
    known: dict[int, float] = {}

    def count(node: yaml.Node) -> float:
        if id(node) not in known:
            known[id(node)] = math.inf  # until it is known: whoever asks meanwhile lies inside it
            below = node.value if isinstance(node, yaml.CollectionNode) else []
            known[id(node)] = 1 + sum(count(child) for item in below for child in _nodes(item))
        return known[id(node)]

    return count(root)


def _nodes(item: Any) -> tuple[yaml.Node, ...]:
    """The nodes of a sequence's item, or of a mapping's pair of key and value."""
    return item if isinstance(item, tuple) else (item,)


def _repeated_key(root: yaml.Node | None) -> yaml.ScalarNode | None:
    """The first key that a mapping holds twice: YAML would silently keep the last."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if key.value in [earlier.value for earlier in keys[:place]]:
                return key
        waiting += [value for _, value in node.value]
    return None


def _expand(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, where) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        found = os.environ.get(name) or default
        if found is None:
            raise ConfigError(
                f"{where}: the environment variable {name} in {value!r} is not set; set it, or write "
                f"${{{name}:-default}}."
            )
        return found

    return re.sub(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}", replace, value)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Apply `key.path=value` (a YAML value). Raises ConfigError."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override!r}: write key.path=value.")
    *parents, last = path.split(".")
    place = values
    for key in parents:
        below = place.setdefault(key, {})
        if not isinstance(below, dict):
            raise ConfigError(f"--set {override!r}: {key!r} is a value, not a mapping.")
        place = below
    place[last] = _read_yaml(text, f"--set {override!r}")


def _describe(problem: Mapping[str, Any], model: type[BaseModel]) -> str:
    """One pydantic error as `place: what is wrong (got value)`, with the nearest known key for an unknown one."""
    location = [str(part) for part in problem["loc"]]
    place = ".".join(location) or "the run file"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], model)
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}."
        return f"{place}: unknown key; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{place}: this key is required"
    if problem["type"] == "value_error":
        return f"{place}: {message}"
    return f"{place}: {message} (got {problem['input']!r})"


def _known_keys(location: list[str], model: type[BaseModel]) -> list[str]:
    for key in location:
        field = model.model_fields.get(key)
        if field is None:
            continue  # the name of an objective: its model was already entered with the mapping
        model = next((m for m in _models_in(field.annotation)), model)
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
