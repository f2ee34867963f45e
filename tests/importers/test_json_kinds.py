"""A field of a JSON file is the same whether its values are looked at one by one or many at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from railbus.importers.json_kinds import Kind
from railbus.importers.json_lines import JsonLines
from railbus.importers.source import Options
from railbus_shared.errors import InvalidField

WHOLE = st.integers(-5, 5) | st.sampled_from([2**63 - 1, 2**63, -(2**63), 2**64 - 1])
FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=16) | st.sampled_from([1e38, 1e39, -1e300])
TEXTS = st.sampled_from(["", "a", "b", "1"])
ITEMS = st.one_of(WHOLE, FLOATS, st.booleans(), TEXTS)
SORTS: tuple[st.SearchStrategy[Any], ...] = (
    WHOLE,
    FLOATS,
    WHOLE | FLOATS,
    TEXTS,
    st.booleans(),
    st.lists(st.integers(-5, 5) | FLOATS, max_size=3),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=2), max_size=2),
    st.lists(ITEMS, max_size=2),
    st.none(),
    st.just({"a": 1}),
)
VALUES = st.lists(st.one_of(SORTS), max_size=4) | st.sampled_from(SORTS).flatmap(lambda one: st.lists(one, max_size=8))


def outcome(kind: Kind, look: Callable[[], object], values: list[Any]) -> object:
    """What the field is and what its values become, or why it is refused."""
    try:
        look()
        kind.settle()
        return kind.column(), repr(kind.values(values))
    except InvalidField as exc:
        return str(exc)


@pytest.mark.parametrize("name", ["x", "label"])
@pytest.mark.parametrize("missing", ["refuse", "fill"])
@settings(max_examples=500, deadline=None, derandomize=True)
@given(values=VALUES, cut=st.integers(0, 8), is_forced=st.booleans())
def test_many_values_at_once_are_seen_as_one_by_one(
    name: str, missing: Any, values: list[Any], cut: int, *, is_forced: bool
) -> None:
    options = Options(missing=missing, text_columns=frozenset({name} if is_forced else ()))
    one, many = Kind(name, file="f", options=options), Kind(name, file="f", options=options)
    lines = list(range(1, len(values) + 1))

    def singly() -> None:
        for value, line in zip(values, lines, strict=True):
            one.see(value, line=line)

    def at_once() -> None:
        many.see_all(values[:cut], lines=lines[:cut])
        many.see_all(values[cut:], lines=lines[cut:])

    assert outcome(many, at_once, values) == outcome(one, singly, values)


def test_fields_that_come_and_go_are_missing_where_they_are_not(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": n} if n % 5000 else {"a": n, "b": [n]} for n in range(10_000)]
    (tmp_path / "t.jsonl").write_bytes(b"\n\n".join(map(orjson.dumps, rows)))
    with pytest.raises(InvalidField, match=r"'columns\.b' has value None: line 3 of 't\.jsonl' has nothing here"):
        JsonLines(tmp_path / "t.jsonl", Options())
    found = JsonLines(tmp_path / "t.jsonl", Options(missing="fill"))
    assert (found.outline.samples, found.outline.columns["b"].variable_length) == (10_000, True)
    chunks = list(found.chunks())
    assert [int(number) for chunk in chunks for number in chunk["a"]] == list(range(10_000))  # type: ignore[union-attr]
