"""The tree of errors, their codes, and their way over the wire."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from railbus_shared import errors, wire
from railbus_shared.bus.connection import BusClosed
from railbus_shared.errors import (
    ConfigError,
    Internal,
    RailbusError,
    RejectedError,
    TaskError,
    TransientError,
    WireError,
    error_from_wire,
    known_codes,
    shorten,
)

BRANCHES = (ConfigError, WireError, TransientError, RejectedError, TaskError)


def _below(cls: type[RailbusError]) -> Iterator[type[RailbusError]]:
    for child in cls.__subclasses__():
        if child.__module__.startswith("railbus_shared"):
            yield child
            yield from _below(child)


CLASSES = list(_below(RailbusError))


def test_no_two_errors_share_a_code() -> None:
    assert BusClosed in CLASSES  # also those that are defined elsewhere
    assert len({cls.code for cls in CLASSES}) == len(CLASSES)
    assert all(known_codes()[cls.code] is cls for cls in CLASSES)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_is_on_one_branch_and_says_who_sees_it(cls: type[RailbusError]) -> None:
    assert cls is Internal or sum(issubclass(cls, branch) for branch in BRANCHES) == 1
    assert cls.__doc__ is not None
    assert cls.__doc__ != (cls.__mro__[1].__doc__)
    assert 400 <= cls.status < 600
    assert cls.code == errors.code_of(cls.__name__)
    assert cls.code.replace("_", "").isupper()


@pytest.mark.parametrize(
    ("name", "code"), [("ShardCorrupt", "SHARD_CORRUPT"), ("NotFound", "NOT_FOUND"), ("Conflict", "CONFLICT")]
)
def test_a_code_is_the_class_name_in_upper_snake(name: str, code: str) -> None:
    assert errors.code_of(name) == code


@pytest.mark.parametrize("encoding", wire.Encoding)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_arrives_as_the_class_that_was_sent(cls: type[RailbusError], encoding: wire.Encoding) -> None:
    sent = cls.__new__(cls)
    RailbusError.__init__(sent, "it is wrong", hint="mend it", details={"a": 1, "b": None, "c": "x"})
    found = error_from_wire(wire.decode(wire.encode(sent.to_wire(), encoding=encoding)))
    assert type(found) is cls
    assert (found.message, found.hint, found.details) == ("it is wrong", "mend it", {"a": 1, "b": None, "c": "x"})
    assert str(found) == "it is wrong (mend it)"


def test_errors_with_fields_of_their_own_arrive_with_them() -> None:
    sent = errors.ShardCorrupt(path="a/b", expected="12", actual="34")
    found = error_from_wire(sent.to_wire())
    assert isinstance(found, errors.ShardCorrupt)
    assert (str(found), found.details) == (str(sent), {"path": "a/b", "expected": "12", "actual": "34"})


def test_a_code_of_another_version_is_kept() -> None:
    found = error_from_wire({"code": "FROM_THE_FUTURE", "message": "x"})
    assert type(found) is RailbusError
    assert found.details == {"remote_code": "FROM_THE_FUTURE"}


@pytest.mark.parametrize("body", [{}, {"code": 3}, {"details": "x"}, {"message": None, "hint": []}])
def test_a_damaged_error_is_still_an_error(body: dict[str, object]) -> None:
    assert str(error_from_wire(body))


def test_a_long_value_is_cut() -> None:
    assert shorten("x" * 1000) == "'" + "x" * 78 + "…"
    assert shorten("x\n") == r"'x\n'"
