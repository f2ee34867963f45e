"""The set of keys behaves like a set, however the numbers come."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from railbus_shared import number_spans
from railbus_telemetry import seen as seen_module
from railbus_telemetry.seen import Seen


def filled(*numbers: int, producer: str = "p", now_ns: int = 5) -> Seen:
    seen = Seen()
    for number in numbers:
        seen.add(producer, number, now_ns=now_ns)
    return seen


@pytest.mark.parametrize(
    ("numbers", "spans"),
    [
        ([1, 2, 3], [[1, 3]]),
        ([3, 2, 1], [[1, 3]]),
        ([1, 3], [[1, 1], [3, 3]]),
        ([1, 3, 2], [[1, 3]]),
        ([5, 1], [[1, 1], [5, 5]]),
        ([5, 1, 4, 2], [[1, 2], [4, 5]]),
        ([5, 1, 4, 2, 3], [[1, 5]]),
        ([2, 2, 2], [[2, 2]]),
        ([2**64 - 1, 2**64 - 2], [[2**64 - 2, 2**64 - 1]]),
    ],
)
def test_numbers_are_kept_as_spans_without_gaps(numbers: list[int], spans: list[list[int]]) -> None:
    assert filled(*numbers).to_map() == {"p": [5, *spans]}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 40)), max_size=120))
def test_it_is_a_set(keys: list[tuple[str, int]]) -> None:
    seen, model = Seen(), set[tuple[str, int]]()
    for key in keys:
        assert seen.add(*key, now_ns=0) == (key not in model)
        model.add(key)
    for producer in "abc":
        for number in range(1, 42):
            assert ((producer, number) in seen) == ((producer, number) in model)


@given(st.sets(st.integers(1, 60)), st.integers(0, 2**62))
def test_what_is_saved_is_loaded(numbers: set[int], now_ns: int) -> None:
    seen = filled(*numbers, now_ns=now_ns)
    loaded = Seen.from_map(orjson.loads(orjson.dumps(seen.to_map())))
    assert loaded.to_map() == seen.to_map()
    assert all(not loaded.add("p", number, now_ns=0) for number in numbers)


@pytest.mark.parametrize(
    "entry",
    [None, {}, [], ["5"], [5, [1]], [5, [1, 2, 3]], [5, [0, 1]], [5, [3, 2]], [5, [1, 2**64]], [5, [1, "2"]],
     [5, [4, 5], [1, 2]], [5, [1, 2], [3, 4]], [5, [1, 4], [3, 6]]],
)  # fmt: skip
def test_what_it_did_not_save_is_refused(entry: object) -> None:
    with pytest.raises(ValueError, match=r"entry|span"):
        Seen.from_map({"p": entry})


def test_idle_producers_are_forgotten_and_others_kept() -> None:
    seen = filled(1, producer="old", now_ns=10)
    seen.add("new", 1, now_ns=20)
    seen.add("revived", 1, now_ns=1)
    seen.add("revived", 1, now_ns=20)
    assert seen.forget_idle(since_ns=20) == 1
    assert ("old", 1) not in seen
    assert ("new", 1) in seen
    assert ("revived", 1) in seen


def test_a_producer_of_nothing_but_gaps_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(number_spans, "MAX_SPANS", 10)
    seen = filled(*range(1, 101, 2))
    assert seen.num_spans == 10
    assert ("p", 99) in seen
    assert ("p", 1) not in seen


def test_a_flood_of_producers_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_module, "MAX_PRODUCERS", 100)
    seen = filled(1, producer="busy", now_ns=1)
    for number in range(2, 1000):
        seen.add(f"once-{number}", 1, now_ns=number)
        seen.add("busy", number, now_ns=number)
        assert seen.num_spans <= 100
    assert seen.num_spans > 85
    assert ("once-999", 1) in seen
    assert ("busy", 999) in seen
    assert ("busy", 1) in seen


def test_a_flood_of_a_persons_producers_costs_no_service_and_first_of_all_that_person(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(seen_module, "MAX_PRODUCERS", 100)
    seen = filled(1, producer="service", now_ns=1)
    seen.add("ben/script", 1, now_ns=1)
    for number in range(1, 1000):
        seen.add(f"ann/once-{number}", 1, now_ns=number)
        assert seen.num_spans <= 101
    assert seen.num_spans > 85
    assert ("service", 1) in seen
    assert ("ben/script", 1) in seen
    assert ("ann/once-999", 1) in seen
    assert ("ann/once-1", 1) not in seen


def test_the_numbers_of_a_service_and_of_each_person_are_apart_and_are_saved_so() -> None:
    seen = filled(1, 2, producer="p")
    seen.add("ann/p", 2, now_ns=7)
    assert seen.to_map() == {"p": [5, [1, 2]], "ann/p": [7, [2, 2]]}
    for found in (seen, Seen.from_map(seen.to_map())):
        assert found.is_free("ben/p", 1, 9)
        assert found.is_free("ann/p", 1, 1)
        assert not found.is_free("ann/p", 2, 2)
        assert found.forget_idle(since_ns=6) == 1
        assert ("p", 1) not in found
        assert ("ann/p", 2) in found
