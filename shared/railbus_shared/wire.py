"""Bytes to maps and back: msgpack out; msgpack or JSON in, told apart by the first byte.

Decoding is total: any bytes give a map with string keys or raise a `WireError`, within bounded time and memory. A
payload is a map without extension types and without binary, so that JSON can say the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from enum import Enum
from itertools import chain
from typing import Any, Final, cast

import msgpack
import orjson

from railbus_shared.errors import BadMessage, MessageTooLarge

MAX_BYTES: Final = 512 * 1024
MAX_DEPTH: Final = 32
MAX_NODES: Final = 100_000  # maps and arrays in one message; a batch of 1000 events has some 3000
_MAX_ITEMS: Final = 65_536
_FEW: Final = 64
_INT_DIGITS: Final = 20  # of 2**64 - 1; orjson turns larger numbers into inexact floats
_BRANCHES: Final = frozenset({dict, list, tuple})
_PASSING: Final = frozenset({str, int, bool, type(None)}) | _BRANCHES
_COMMON: Final = _PASSING | {float}
_STR: Final = frozenset({str})
_NUMBERS: Final = frozenset({float, bool})
_CONTAINERS: Final = bytes([*range(0x80, 0xA0), 0xDC, 0xDD, 0xDE, 0xDF])
"""What begins a map or an array in msgpack; in the midst of a number or text it begins none."""
_COLUMNS: Final = cast("bytes", msgpack.packb({"v": 2}))[1:]
"""How batches of events begin that hold few maps and arrays, so that a call for each costs less than encoding again."""
_LIMITS: Final[dict[str, Any]] = {
    "raw": False,
    "strict_map_key": True,
    "max_str_len": MAX_BYTES,
    "max_bin_len": 0,
    "max_ext_len": 0,
    "max_array_len": _MAX_ITEMS,
    "max_map_len": _MAX_ITEMS,
}


class Encoding(Enum):
    """How a message is written; an answer is written like its request."""

    MSGPACK = "application/msgpack"
    JSON = "application/json"


def encoding_of(data: bytes) -> Encoding:
    """Msgpack or JSON, by the first byte: msgpack maps begin 0x80-0x8f, 0xde, 0xdf, JSON objects with `{` or space."""
    if not data:
        raise BadMessage("the payload is empty", hint="send one map, as msgpack or JSON")
    first = data[0]
    if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
        return Encoding.MSGPACK
    if first in b"{ \t\r\n":
        return Encoding.JSON
    raise BadMessage(
        f"the payload begins with byte 0x{first:02x}, which starts neither a msgpack map nor a JSON object",
        hint="send one map, as msgpack or JSON",
    )


def decode(data: bytes, *, limit_bytes: int = MAX_BYTES) -> dict[str, object]:
    """The map in a payload; raises BadMessage or MessageTooLarge."""
    if len(data) > limit_bytes:
        raise MessageTooLarge(size_bytes=len(data), limit_bytes=limit_bytes)
    if encoding_of(data) is Encoding.JSON:
        return _decode_json(data)
    return _decode_msgpack(data)


def encode(message: Mapping[str, object], *, encoding: Encoding = Encoding.MSGPACK) -> bytes:
    """A map as bytes; raises BadMessage if it cannot be said in both encodings, MessageTooLarge over the limit."""
    _check_shape(message)
    try:
        if encoding is Encoding.JSON:
            data = orjson.dumps(message)
        else:
            data = cast("bytes", msgpack.packb(message, use_bin_type=True))
    except (TypeError, ValueError, OverflowError) as exc:
        raise BadMessage(f"the message cannot be encoded: {exc}", hint="use maps, lists, strings and numbers") from exc
    if len(data) > MAX_BYTES:
        raise MessageTooLarge(size_bytes=len(data), limit_bytes=MAX_BYTES)
    return data


NOT_FINITE: Final = ("NaN", "Infinity", "-Infinity")
"""What stands in JSON for a number that it cannot say."""


def finite(value: object) -> object:
    """A number that JSON can say: NaN and the infinities become the strings `NaN`, `Infinity`, `-Infinity`."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _decode_json(data: bytes) -> dict[str, object]:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as exc:
        raise BadMessage(
            f"the payload is not valid JSON: {exc}", hint="check for a cut or unbalanced document"
        ) from exc
    except RecursionError as exc:
        raise BadMessage(f"the payload is nested deeper than {MAX_DEPTH}") from exc
    if not isinstance(value, dict):
        raise BadMessage("the payload is not a map", hint="send one JSON object")
    _check_shape(value)
    json.loads(data.decode(), object_pairs_hook=_unique, parse_int=_whole)  # what orjson lets pass
    return value


def _unique(pairs: list[tuple[str, object]]) -> None:
    if len(dict(pairs)) != len(pairs):
        raise BadMessage("a map in the payload has the same key twice", hint="give each key once")


def _whole(digits: str) -> int:
    if len(digits) <= _INT_DIGITS and -(2**63) <= int(digits) < 2**64:
        return 0
    raise BadMessage("the payload holds a whole number beyond 64 bits", hint="write it as a string")


class _Counter:
    """Counts containers while msgpack builds them, so that a bomb is refused before it is unpacked whole."""

    def __init__(self) -> None:
        self.nodes = 0

    def count(self) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise BadMessage(f"the payload has more than {MAX_NODES} maps and arrays")

    def array(self, items: list[object]) -> list[object]:
        self.count()
        return items

    def map(self, pairs: list[tuple[object, object]]) -> dict[object, object]:
        self.count()
        built = dict(pairs)
        if len(built) != len(pairs):
            raise BadMessage("a map in the payload has the same key twice", hint="give each key once")
        if not _STR.issuperset(map(type, built)):
            raise BadMessage("a map in the payload has a key that is not a string", hint="use string keys")
        return built


def _as_encoded(data: bytes) -> object:
    """What `encode` made these bytes of, without a call for each map and array; None if it did not make them.

    Bytes that come out again as they were have no key twice; no more containers are built than bytes could begin one.
    """
    if len(data) - len(data.translate(None, _CONTAINERS)) > MAX_NODES:
        return None
    try:
        value: object = msgpack.unpackb(data, **_LIMITS)
        return value if msgpack.packb(value, use_bin_type=True) == data else None
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError, TypeError, OverflowError):
        return None  # the slow way says what is wrong


def _decode_msgpack(data: bytes) -> dict[str, object]:
    value = None if data[1:4] == _COLUMNS else _as_encoded(data)
    if value is None:
        value = _unpacked(data)
    if not isinstance(value, dict):
        raise BadMessage("the payload is not a map", hint="send one msgpack map")
    _check_shape(value, is_decoded=True)
    return value


def _unpacked(data: bytes) -> object:
    """Raises BadMessage."""
    counter = _Counter()
    try:
        return cast(
            "object",
            msgpack.unpackb(data, **_LIMITS, list_hook=counter.array, object_pairs_hook=counter.map),
        )
    except BadMessage:
        raise
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError, TypeError) as exc:
        reason = str(exc) or type(exc).__name__
        raise BadMessage(
            f"the payload is not valid msgpack: {reason}", hint="send one map without extension types"
        ) from exc


def _are_numbers(values: list[object]) -> bool:
    """Whether decoded values are finite numbers and nothing else; False says only that each has to be looked at.

    A sum tells it in a fifth of the time. Not for what a caller made: his objects may do anything when they are added.
    """
    try:
        total = sum(cast("Iterable[float]", values))
    except TypeError:
        return False
    return type(total) is int or math.isfinite(total)


def _check_shape(root: Mapping[str, object], *, is_decoded: bool = False) -> None:
    """Refuse what is too deep, too many, or cannot be said in both encodings; iterative, so depth costs no stack.

    Of many containers all values of one depth are looked at together, which costs half of looking at each.
    """
    nodes = 0
    level: list[object] = [root]
    for _ in range(MAX_DEPTH):
        each = map(_values, level)
        inner: list[object] = []
        for values in each if len(level) <= _FEW else (list(chain.from_iterable(each)),):
            if is_decoded and type(values) is list and _are_numbers(values):
                continue
            kinds = set(map(type, values))
            if not (kinds <= _COMMON and (float not in kinds or _are_finite(values, kinds))):
                _check_scalars(values)
            if kinds & _BRANCHES:
                inner += [value for value in values if type(value) in _BRANCHES]
        level = inner
        nodes += len(level)
        if nodes > MAX_NODES:
            raise BadMessage(f"the payload has more than {MAX_NODES} maps and arrays")
        if not level:
            return
    raise BadMessage(f"the payload is nested deeper than {MAX_DEPTH}", hint="flatten it")


def _are_finite(values: Iterable[object], kinds: set[type]) -> bool:
    """Whether all floats among values of common types are finite; nearly always their sum says so."""
    found = values if kinds <= _NUMBERS else [value for value in values if type(value) is float]
    numbers = cast("Iterable[float]", found)
    return math.isfinite(sum(numbers)) or all(map(math.isfinite, numbers))


def _values(container: object) -> Iterable[object]:
    if type(container) is not dict and not isinstance(container, Mapping):
        return cast("Iterable[object]", container)
    if not (_STR.issuperset(map(type, container)) or all(isinstance(key, str) for key in container)):
        raise BadMessage("a map in the payload has a key that is not a string", hint="use string keys")
    return cast("Mapping[str, object]", container).values()


def _check_scalars(values: Iterable[object]) -> None:
    """Values of which some are of a type that is not common, or not finite."""
    for value in values:
        if type(value) not in _PASSING:
            _check_scalar(value)


def _check_scalar(value: object) -> None:
    """A value of a type that is not common: floats, and subclasses of what may pass."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadMessage("the payload holds NaN or an infinity", hint="write it as a string")
    elif isinstance(value, bytes):
        raise BadMessage("the payload holds binary", hint="pass bulk data as files")
    elif not isinstance(value, str | int):
        raise BadMessage(f"the payload holds a {type(value).__name__}", hint="use maps, lists, strings and numbers")
