"""Whose turn it is: priority, shares of owners, age; the same whatever the order in which the queue is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_for_tests import job
from railbus_device_manager.turns import in_turn
from railbus_device_manager.wishes import Waiting


def waiting(number: int, owner: str | None = None, *, priority: int = 0, count: int = 1) -> Waiting:
    return Waiting.of(job(f"j-{number}", owner=owner, priority=priority, count=count))


def order(
    queue: Sequence[Waiting],
    *,
    shares: Mapping[str, float] | None = None,
    weights: Mapping[str, float] | None = None,
    late: Sequence[int] = (),
) -> list[str]:
    turns = in_turn(
        queue, shares=shares, weights=weights, has_waited_long=lambda one: one.id in {f"j-{number}" for number in late}
    )
    return [turn.id.removeprefix("j-") for turn in turns]


ANN_THEN_BOB = [waiting(1, "ann"), waiting(2, "ann"), waiting(3, "ann"), waiting(4, "bob"), waiting(5, "bob")]


@pytest.mark.parametrize(
    ("shares", "weights", "expected"),
    [
        ({}, {}, "14253"),
        ({"ann": 1.0}, {}, "41523"),
        ({"ann": 0.4}, {}, "41523"),
        ({"ann": 5.0}, {}, "45123"),
        ({"bob": 2.0}, {}, "12345"),
        ({"bob": 2.0}, {"bob": 10.0}, "14523"),
        ({}, {"ann": 2.0}, "14235"),
        ({"ann": 4.0}, {"ann": 4.0}, "41523"),
    ],
)
def test_the_owner_goes_first_who_uses_least_for_his_weight(
    shares: dict[str, float], weights: dict[str, float], expected: str
) -> None:
    assert "".join(order(ANN_THEN_BOB, shares=shares, weights=weights)) == expected


def test_a_job_for_several_devices_counts_for_as_many() -> None:
    queue = [waiting(1, "ann", count=3), waiting(2, "ann"), *(waiting(number, "bob") for number in range(3, 8))]
    assert "".join(order(queue)) == "1345267"


def test_priority_goes_before_shares_and_what_it_brings_counts() -> None:
    queue = [waiting(1, "ann", priority=5), waiting(2, "ann", priority=5), waiting(3, "ann"), waiting(4, "bob")]
    assert "".join(order(queue, shares={"ann": 100.0})) == "1243"


def test_jobs_without_an_owner_are_one_owner() -> None:
    queue = [waiting(1), waiting(2), waiting(3), waiting(4, "ann")]
    assert "".join(order(queue)) == "1423"


def test_of_jobs_for_several_devices_that_have_waited_long_the_oldest_goes_first_and_it_alone() -> None:
    queue = [waiting(1, "ann"), waiting(2, "ann", count=4), waiting(3, "ann", count=4), waiting(4, "bob", count=2)]
    uses_much = {"ann": 50.0}
    assert "".join(order(queue, shares=uses_much)) == "4123"
    assert "".join(order(queue, shares=uses_much, late=(1, 2, 3))) == "2413"
    assert "".join(order(queue, shares=uses_much, late=(1,))) == "4123"


OWNERS = st.sampled_from([None, "ann", "bob", "cy"])


@st.composite
def queues(draw: st.DrawFn) -> list[Waiting]:
    return [
        waiting(number, draw(OWNERS), priority=draw(st.integers(-1, 1)), count=draw(st.integers(1, 4)))
        for number in range(draw(st.integers(0, 12)))
    ]


@given(queues(), st.dictionaries(st.sampled_from(["", "ann", "bob"]), st.floats(0, 20)), st.randoms())
def test_everyone_has_one_turn_and_the_order_of_telling_does_not_matter(
    queue: list[Waiting], shares: dict[str, float], random: Random
) -> None:
    turns = order(queue, shares=shares)
    shuffled = queue[:]
    random.shuffle(shuffled)
    assert order(shuffled, shares=shares) == turns
    assert sorted(turns, key=int) == [str(number) for number in range(len(queue))]
    by_id = {one.id: one for one in queue}
    ordered = [by_id[f"j-{turn}"] for turn in turns]
    assert [one.priority for one in ordered] == sorted((one.priority for one in ordered), reverse=True)
    for owner in {one.owner for one in queue}:
        for priority in (-1, 0, 1):
            ages = [one.age for one in ordered if (one.owner, one.priority) == (owner, priority)]
            assert ages == sorted(ages)


@given(st.lists(st.sampled_from(["ann", "bob", "cy"]), min_size=6, max_size=40))
def test_as_long_as_two_owners_wait_neither_is_more_than_one_job_ahead(owners: list[str]) -> None:
    queue = [waiting(number, owner) for number, owner in enumerate(owners)]
    left = Counter(owners)
    had: Counter[str] = Counter()
    for turn in order(queue):
        owner = owners[int(turn)]
        had[owner] += 1
        left[owner] -= 1
        assert all(had[owner] - had[other] <= 1 for other in left if left[other] > 0)
