"""GPUs that are shared by memory: shares that a job needs, and choosing devices for a lease by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest

from cluster_for_tests import device, lease
from railbus_device_manager.choosing import choose
from railbus_device_manager.sharing import division, free_shares, has_room, shares_needed
from railbus_shared.contracts.jobs import DevicePreference
from railbus_shared.contracts.requests import DeviceState
from railbus_shared.errors import NoFreeDevice

WHOLE = DevicePreference()


def fraction(part: float) -> DevicePreference:
    return DevicePreference(sharing="fraction", fraction=part)


def gpu(name: str = "a-gpu0", *, shares: int = 1, free: int = 0, state: str = "free") -> DeviceState:
    return DeviceState.parse(
        {"device": device(name).changed(shares=shares).to_map(), "state": state, "free_shares": free}
    )


@pytest.mark.parametrize("shares", range(1, 65))
def test_a_fraction_takes_the_fewest_shares_that_hold_it(shares: int) -> None:
    one = device("a-gpu0").changed(shares=shares)
    for percent in range(1, 101):
        needed = shares_needed(one, fraction(percent / 100))
        assert Fraction(needed, shares) >= Fraction(percent, 100)
        assert needed == 1 or Fraction(needed - 1, shares) < Fraction(percent, 100)
    assert shares_needed(one, WHOLE) == shares


@pytest.mark.parametrize(
    ("state", "wanted", "expected"),
    [
        (gpu(), WHOLE, True),
        (gpu(), fraction(0.5), True),
        (gpu(state="leased"), fraction(0.5), False),
        (gpu(shares=4, free=4), WHOLE, True),
        (gpu(shares=4, free=3), WHOLE, False),
        (gpu(shares=4, free=2), fraction(0.5), True),
        (gpu(shares=4, free=1), fraction(0.5), False),
        (gpu(shares=4, free=4, state="cordoned"), fraction(0.25), False),
    ],
)
def test_there_is_room_where_enough_shares_are_free(
    state: DeviceState, wanted: DevicePreference, *, expected: bool
) -> None:
    assert has_room(state, wanted) == expected


def test_a_division_stays_while_somebody_has_a_part() -> None:
    part = lease("a-gpu0", "j-1").changed(share=2, shares=4)
    assert [division(held, wanted=8) for held in ((), (part,), (lease("a-gpu0", "j-1"),))] == [8, 4, 1]
    one = device("a-gpu0").changed(shares=4)
    assert [free_shares(one, held) for held in ((), (part,), (part, part), (lease("a-gpu0", "j-1"),))] == [4, 3, 2, 0]


def test_a_lease_by_hand_takes_what_is_free_of_the_first_kind_that_has_enough() -> None:
    states = [gpu("b-gpu0", state="leased"), gpu("b-gpu1"), gpu("c-gpu0"), gpu("c-gpu1"), gpu("a-cpu0")]
    assert [one.id for one in choose(WHOLE, states)] == ["b-gpu1"]
    assert [one.id for one in choose(WHOLE.changed(count=2), states)] == ["c-gpu0", "c-gpu1"]
    assert [one.id for one in choose(DevicePreference.parse({"kind": ["cpu", "gpu"]}), states)] == ["a-cpu0"]
    with pytest.raises(NoFreeDevice, match="3 free gpu or cpu devices"):
        choose(WHOLE.changed(count=3), states)
    shared = [gpu("a-gpu0", shares=4, free=1), gpu("a-gpu1", shares=4, free=2)]
    assert [one.id for one in choose(fraction(0.5), shared)] == ["a-gpu1"]
