"""What every contract has in common, and how a map becomes one with errors that name the field.

Contracts are frozen, refuse unknown fields and do not coerce: `"3"` is no number. Adding a field with a default is
compatible; anything else is a new version.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Final, Self, TypeVar, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, Strict, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError

from railbus_shared import clock, names
from railbus_shared.errors import InvalidField, InvalidName, WireError

T = TypeVar("T")
C = TypeVar("C", bound="Contract")

JsonMap = dict[str, JsonValue]


class Contract(BaseModel):
    """Base of all contracts."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        ser_json_inf_nan="strings",
    )

    @classmethod
    def parse(cls, message: Mapping[str, object]) -> Self:
        """A contract from a decoded map; raises InvalidField or InvalidName, which name field, value and remedy."""
        try:
            return cls.model_validate(message)
        except ValidationError as exc:
            raise field_error(cls, exc) from exc

    def to_map(self) -> dict[str, object]:
        """The map that goes on the wire; fields that are None are left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def changed(self, **fields: object) -> Self:
        """A copy with other values in some fields, validated anew."""
        return type(self).model_validate({**dict(self), **fields})


def _checked(check: Any, kind: str) -> AfterValidator:
    def validate(value: str) -> str:
        try:
            return cast("str", check(value, kind=kind))
        except InvalidName as exc:
            raise PydanticCustomError("invalid_name", "{rule}", {"rule": exc.hint.removeprefix("use ")}) from exc

    return AfterValidator(validate)


def _time(value: str) -> str:
    clock.parse_rfc3339(value)
    return value


def _pattern(pattern: str, example: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern, "examples": [example]})


Id = Annotated[str, _checked(names.checked_id, "id"), _pattern(names.ID_PATTERN, "j-4f09ac-17")]
Name = Annotated[str, _checked(names.checked_name, "name"), _pattern(names.NAME_PATTERN, "digits")]
EntrypointName = Annotated[
    str, _checked(names.checked_entrypoint, "entrypoint"), _pattern(names.ENTRYPOINT_PATTERN, "classifier")
]
Time = Annotated[str, AfterValidator(_time), WithJsonSchema({"type": "string", "format": "date-time"})]
"""RFC 3339 in UTC with up to nine decimals."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""Hex SHA-256."""
TraceParent = Annotated[str, Field(pattern=r"^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$")]
"""A span and its trace, as W3C's `traceparent` has them."""
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Items = Annotated[tuple[T, ...], Strict(strict=False)]
"""A list on the wire, a tuple in Python."""

_HINTS: Final = {
    "missing": "give the field",
    "string_type": "give a string",
    "int_type": "give a whole number, without quotes",
    "float_type": "give a number, without quotes",
    "bool_type": "give true or false",
    "dict_type": "give a map",
    "tuple_type": "give a list",
    "list_type": "give a list",
    "model_type": "give a map",
}


def field_error(model: type[BaseModel], error: ValidationError) -> WireError:
    """The first fault that pydantic found, as an error of ours."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "(message)"
    if first["type"] == "invalid_name":
        return InvalidName(kind=field, value=first["input"], rule=first["msg"])
    value = "(missing)" if first["type"] == "missing" else first["input"]
    return InvalidField(field=field, value=value, problem=_problem(first), hint=_hint(model, first))


def _problem(fault: ErrorDetails) -> str:
    if fault["type"] == "extra_forbidden":
        return "there is no such field"
    if fault["type"] == "missing":
        return "the field is required"
    problem = fault["msg"].removeprefix("Value error, ")  # of a validator of ours, whose words are enough
    return problem[:1].lower() + problem[1:]


def _hint(model: type[BaseModel], fault: ErrorDetails) -> str:
    if fault["type"] != "extra_forbidden":
        return _HINTS.get(fault["type"], "see docs/messages.md")
    known = _fields_at(model, [str(part) for part in fault["loc"][:-1]])
    close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(known)}"


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the fields of the model that `path` leads to; of the last one on the way that is known."""
    for part in path:
        info = model.model_fields.get(part)
        inner = info.annotation if info is not None else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    return list(model.model_fields)
