"""Which strings may become part of a path or a subject."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from railbus_shared import names
from railbus_shared.errors import InvalidName
from railbus_shared.names import checked_entrypoint, checked_id, checked_name

NEVER = [
    "", ".", "..", "../x", "a/../b", "a..b", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\n", "\na", "a b", " a", "a\t",
    "-rf", "-a", "_a", ".hidden", "A", "aB", "É", "é", "ａ", "а", "a․b", "a．．b", "ⅰ", "ı", "²", "١",
    "%2e%2e", "a%2eb", "a*", "a>", "*", ">", "a=b", "$KV", "a$b", "~", "a'b", 'a"b', "a\r\nb", "a\u200bb",
    "a\u2028", "𝟏",
]  # fmt: skip


@pytest.mark.parametrize("value", NEVER, ids=ascii)
@pytest.mark.parametrize("check", [checked_id, checked_name, checked_entrypoint])
def test_strings_that_may_be_no_name_at_all_are_refused(check: Callable[..., str], value: str) -> None:
    with pytest.raises(InvalidName) as caught:
        check(value, kind="thing")
    assert caught.value.details["field"] == "thing"
    assert caught.value.code == "INVALID_NAME"
    assert caught.value.hint.startswith("use ")


@pytest.mark.parametrize("value", ["a", "0", "a-b_c", "j-4f09ac-17", "a" * 64, "0--", "a__"])
def test_ids_are_single_subject_tokens(value: str) -> None:
    assert checked_id(value) == value
    assert checked_name(value) == value


@pytest.mark.parametrize("value", ["a.b", "v1.2.3", "a" * 65, "a" * 128, "a.", "a.-"])
def test_names_may_hold_dots_and_be_longer_where_ids_may_not(value: str) -> None:
    assert checked_name(value) == value
    with pytest.raises(InvalidName):
        checked_id(value)


@pytest.mark.parametrize("value", ["a" * 129, "a" * 200, "a:b", "a..", "a...b"])
def test_names_that_are_too_long_or_climb_are_refused(value: str) -> None:
    with pytest.raises(InvalidName):
        checked_name(value)


@pytest.mark.parametrize("value", ["classifier", "next_token", "pkg.mod:fn", "mod:fn", "Pkg._m.M2:Fn", "a" * 64])
def test_entrypoints_are_short_names_or_functions(value: str) -> None:
    assert checked_entrypoint(value) == value


@pytest.mark.parametrize(
    "value",
    ["mod:", ":fn", "a.b", "a..b:c", ".a:b", "a:b:c", "a:b.c", "a-b:c", "a:b()", "os;x:y", "1a:b", "a" * 65, "a:b\n",
     "a." * 100 + "b:c"],
)  # fmt: skip
def test_other_entrypoints_are_refused(value: str) -> None:
    with pytest.raises(InvalidName):
        checked_entrypoint(value)


@given(st.text(max_size=140))
def test_whatever_is_accepted_is_one_plain_word(value: str) -> None:
    for check in (checked_id, checked_name):
        try:
            check(value)
        except InvalidName:
            continue
        assert re.fullmatch(r"[a-z0-9._-]+", value, re.ASCII)
        assert ".." not in value
        assert value[0] not in ".-_"


@given(st.from_regex(re.compile(r"\A(?!.*\.\.)[a-z0-9][a-z0-9._-]{0,127}\Z")))
def test_a_name_survives_as_a_token(name: str) -> None:
    token = names.key_token(name)
    assert "." not in token
    assert names.name_from_token(token) == name


@pytest.mark.parametrize(
    ("system", "host"),
    [
        ("Node7.Example.COM", "node7-example-com"), ("-x-", "x"), ("...", "localhost"), ("", "localhost"),
        ("a" * 80, "a" * 64), ("host\u00e9", "host"), ("_gpu_1_", "gpu_1"),
    ],
)  # fmt: skip
def test_the_host_id_is_a_valid_id_whatever_the_host_is_called(system: str, host: str) -> None:
    assert names.host_id(system) == host
    assert checked_id(host) == host


def test_this_host_has_an_id() -> None:
    assert names.this_host() == names.host_id(socket.gethostname())
