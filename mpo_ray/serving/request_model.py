"""What all parts of a request share: unknown fields are refused, null asks for nothing, errors name their field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from mpo_ray.serving.neutral import Values, asks_for_nothing, without_nulls


def wrong(field: str, message: str) -> PydanticCustomError:
    """An error of one field that only a look at others finds. `errors` joins its name to the place of its object."""
    return PydanticCustomError("wrong", "{message}", {"message": message, "field": field})


def _document(schema: dict[str, Any], kind: type[BaseModel]) -> None:
    """Say in the JSON schema what `_neutral` does: null is the default, and some fields may only ask for nothing."""
    assert issubclass(kind, Request)
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            kept = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = kept | {"anyOf": [field, {"type": "null"}]}
    for field in schema["properties"].values():
        for one in [field, *field.get("anyOf", ())]:
            if isinstance(values := one.get("additionalProperties"), dict):
                one["additionalProperties"] = {"anyOf": [values, {"type": "null"}]}
    for name, neutral in kind.not_implemented.items():
        schema["properties"].setdefault(name, {"enum": [None, *neutral], "description": "not implemented"})
    schema["additionalProperties"] = {"type": "null"}


class Request(BaseModel):
    """A part of a request. Values of another type than JSON's own are not converted."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, json_schema_extra=_document)
    #: Fields that may be there with a value that asks for nothing.
    not_implemented: ClassVar[Mapping[str, Values]] = {}

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for key, value in values.items():
            if value is None:
                continue
            if key in cls.model_fields or key not in cls.not_implemented:
                kept[key] = value
            elif not asks_for_nothing(value, cls.not_implemented[key]):
                shown = json.dumps(without_nulls(value))[:100]
                raise wrong(key, f"{key} is not implemented by this endpoint; leave it out (got {shown})")
        return kept
