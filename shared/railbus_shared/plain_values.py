"""Values as an event can carry them."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Final, cast

from pydantic import JsonValue

from railbus_shared import wire
from railbus_shared.contracts.model import JsonMap

_MAX_NESTING: Final = 16


def plain_map(data: Mapping[str, object]) -> JsonMap:
    """Data as an event can carry them; floats, which nearly all are, cost no call."""
    return {name: value if type(value) is float and isfinite(value) else plain(value) for name, value in data.items()}


def plain(value: object, *, depth: int = 0) -> JsonValue:
    """A value as an event can carry it: numbers, strings, maps, lists; scalars of NumPy and torch; else its text.

    What no message can say becomes text as well: numbers beyond 64 bits, halves of a surrogate pair, deep nesting.
    """
    match value:
        case None | bool():
            return value
        case int():
            return int(value) if -(2**63) <= value < 2**64 else str(int(value))
        case float():
            return cast("JsonValue", wire.finite(float(value)))
        case Mapping() if depth < _MAX_NESTING:
            return {str(plain(str(key))): plain(item, depth=depth + 1) for key, item in value.items()}
        case list() | tuple() | set() | frozenset() if depth < _MAX_NESTING:
            return [plain(item, depth=depth + 1) for item in value]
        case _:
            return _scalar_or_text(value, depth=depth)


def _scalar_or_text(value: object, *, depth: int) -> JsonValue:
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0 and depth < _MAX_NESTING:
        return plain(item(), depth=depth + 1)
    text = str.__str__(value) if isinstance(value, str) else str(value)
    return text.encode("utf-8", "replace").decode()
