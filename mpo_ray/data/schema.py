"""What the schema of a table says of its values: the names of classes that are stored as numbers.

Knows how `datasets` writes features as JSON, in Parquet's metadata and for hub data sets. Refuses to know what a
class means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

#: What `datasets` stores for a class that is not known.
NO_CLASS = -1


class UnknownClassError(ValueError):
    """A value is none of the classes that its column declares."""


def parquet_features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The features that `datasets` wrote into the metadata of a Parquet file; empty where another program wrote it.

    Raises ValueError where the metadata is not sound.
    """
    written = (metadata or {}).get(b"huggingface")
    if written is None:
        return {}
    features = json.loads(written)["info"].get("features")
    return dict(features or {})


def with_class_names(values: dict[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the names of classes in the place of their numbers, wherever in the row they are.

    Raises UnknownClassError.
    """
    named = {
        column: _named(values[column], feature, f"column {column!r}")
        for column, feature in features.items()
        if column in values and _has_classes(feature)
    }
    return {**values, **named} if named else values


def _has_classes(feature: Any) -> bool:
    if isinstance(feature, list):
        return any(map(_has_classes, feature))
    if not isinstance(feature, Mapping):
        return False
    return (feature.get("_type") == "ClassLabel" and bool(feature.get("names"))) or any(
        map(_has_classes, feature.values())
    )


def _named(value: Any, feature: Any, place: str) -> Any:
    if value is None or not _has_classes(feature):
        return value
    if isinstance(feature, list):
        return [_named(item, feature[0], place) for item in value]
    kind = feature.get("_type")
    if kind == "ClassLabel":
        return _class_name(value, feature["names"], place)
    if not isinstance(kind, str):
        return {key: _named(item, feature.get(key), place) for key, item in value.items()}
    inner = feature.get("feature")
    if isinstance(value, Mapping):  # a sequence of objects is stored as an object of lists
        return {key: [_named(item, inner.get(key), place) for item in items] for key, items in value.items()}
    return [_named(item, inner, place) for item in value]


def _class_name(value: Any, names: list[str], place: str) -> str | None:
    """The name of a class. A text is a name, or, as in CSV files, the number of one."""
    text = str(value).strip()
    if text in ("", "nan", str(NO_CLASS)):
        return None
    if isinstance(value, str) and text in names:
        return text
    number = int(float(text)) if re.fullmatch(r"\d+(\.0+)?", text) else len(names)
    if number < len(names):
        return names[number]
    raise UnknownClassError(f"unknown class: {value!r} in {place}; its schema declares {', '.join(names)}")
