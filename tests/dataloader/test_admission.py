"""The rules of the cache: never over the budget, nothing in use evicted, nobody left waiting for ever."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from railbus_dataloader.admission import Action, Admission, Ask, Evict, Fetch, Refuse, State
from railbus_shared.errors import CacheTooSmall


def want(session: str, key: str, size: int = 1, *, urgent: bool = True) -> Ask:
    return Ask(session, key, size, urgent)


def read(admission: Admission, session: str, key: str, size: int = 1) -> None:
    """The session's reader has asked for a shard, got it, and holds it."""
    admission.pin(session, key)
    admission.ask(want(session, key, size))
    assert admission.decide(0) == [Fetch(key)]
    admission.fetched(key)


def filled(budget: int, *keys: str) -> Admission:
    """A cache in which these lie, of one byte each, the least recently used first."""
    admission = Admission(budget)
    for key in keys:
        admission.found(key, 1)
    return admission


def test_what_fits_is_fetched_at_once_and_its_room_is_reserved() -> None:
    admission = Admission(3)
    for key in "abc":
        admission.ask(want("s", key))
    assert admission.decide(0) == [Fetch("a"), Fetch("b"), Fetch("c")]
    assert admission.used_bytes == 3
    admission.ask(want("s", "d"))
    assert admission.decide(0) == []


def test_what_was_not_used_for_longest_leaves_first_and_its_room_is_given_once_it_is_gone() -> None:
    admission = filled(3, "a", "b", "c")
    admission.touch("a")
    admission.ask(want("s", "d"))
    assert admission.decide(0) == [Evict("b")]
    assert admission.decide(0) == []
    assert admission.used_bytes == 3
    admission.gone("b")
    assert admission.decide(0) == [Fetch("d")]


def test_what_is_needed_last_leaves_before_what_is_needed_soon() -> None:
    admission = filled(3, "a", "b", "c")
    admission.needs("s", ["a", "c", "b"])
    admission.ask(want("t", "d", 2))
    assert admission.decide(0) == [Evict("b"), Evict("c")]


def test_what_nobody_is_known_to_need_leaves_before_what_somebody_needs() -> None:
    admission = filled(2, "a", "b")
    admission.needs("s", ["a"])
    admission.ask(want("t", "c"))
    assert admission.decide(0) == [Evict("b")]


def test_look_ahead_pushes_out_only_what_is_needed_later_than_its_own() -> None:
    admission = filled(2, "a", "b")
    admission.needs("s", ["a", "c", "b", "d"])
    admission.ask(want("s", "d", urgent=False))
    assert admission.decide(0) == []
    admission.ask(want("s", "c", urgent=False))
    assert admission.decide(0) == [Evict("b")]


def test_nothing_pinned_leaves_for_anybody() -> None:
    admission = filled(2, "a", "b")
    admission.pin("s", "a")
    admission.pin("t", "a")
    admission.pin("s", "b")
    admission.ask(want("u", "c"))
    assert admission.decide(0) == []
    admission.unpin("s", "a")
    assert admission.decide(0) == []
    admission.unpin("t", "a")
    assert admission.decide(0) == [Evict("a")]


def test_a_session_that_leaves_lets_go_of_everything() -> None:
    admission = filled(1, "a")
    admission.pin("s", "a")
    admission.needs("s", ["a"])
    admission.ask(want("s", "b"))
    admission.leave("s")
    assert not admission.num_waiting
    admission.ask(want("t", "c", urgent=False))
    assert admission.decide(0) == [Evict("a")]


def test_a_reader_that_waits_goes_before_look_ahead_that_came_earlier() -> None:
    admission = Admission(1)
    admission.ask(want("s", "a", urgent=False))
    admission.ask(want("t", "b"))
    assert admission.decide(0) == [Fetch("b")]


def test_look_ahead_takes_no_room_that_comes_to_a_waiting_reader() -> None:
    admission = Admission(4)
    read(admission, "s", "a")
    admission.unpin("s", "a")
    read(admission, "s", "b", 2)  # s has let go before: it will again
    admission.ask(want("t", "c", 3))
    admission.ask(want("u", "d", urgent=False))
    assert admission.decide(0) == []
    admission.unpin("s", "b")
    assert admission.decide(0) == [Evict("a"), Evict("b")]


def test_look_ahead_goes_on_while_a_reader_waits_for_what_nobody_lets_go_of_and_then_makes_room_for_it() -> None:
    admission = Admission(4)
    read(admission, "s", "a", 2)
    admission.ask(want("t", "b", 3))
    admission.ask(want("u", "c", 2, urgent=False))
    assert admission.decide(0) == [Fetch("c")]
    admission.fetched("c")
    admission.leave("s")
    assert set(admission.decide(0)) == {Evict("a"), Evict("c")}


@pytest.mark.parametrize("urgent", [True, False])
def test_sessions_are_served_in_turn_however_many_shards_one_asks_for(urgent: bool) -> None:
    admission = Admission(1)
    for key in ("a1", "a2", "a3"):
        admission.ask(want("a", key, urgent=urgent))
    for key in ("b1", "b2"):
        admission.ask(want("b", key, urgent=urgent))
    served: list[str] = []
    while admission.num_waiting:
        for action in admission.decide(0):
            if isinstance(action, Fetch):
                served.append(action.key)
                admission.fetched(action.key)
            elif isinstance(action, Evict):
                admission.gone(action.key)
    assert served == ["a1", "b1", "a2", "b2", "a3"]


def test_who_asks_for_what_another_is_given_waits_no_more() -> None:
    admission = Admission(2)
    admission.ask(want("s", "a"))
    admission.ask(want("t", "a"))
    assert admission.decide(0) == [Fetch("a")]
    assert not admission.num_waiting


def test_what_leaves_just_now_is_fetched_again_once_it_is_gone() -> None:
    admission = filled(1, "a")
    admission.ask(want("s", "b"))
    assert admission.decide(0) == [Evict("a")]
    admission.ask(want("t", "a", urgent=False))
    admission.withdraw(want("s", "b"))
    assert admission.decide(0) == []
    admission.gone("a")
    assert admission.decide(0) == [Fetch("a")]


def test_a_shard_that_is_larger_than_the_cache_is_refused_with_both_sizes() -> None:
    with pytest.raises(CacheTooSmall, match=r"shard of 4 bytes does not fit into the cache of 3 bytes") as caught:
        Admission(3).ask(want("s", "a", 4))
    assert "RAILBUS_DATALOADER_CACHE_BYTES" in caught.value.hint
    assert "shuffle='window'" in caught.value.hint


def test_a_trainer_whose_own_shards_leave_no_room_is_refused_after_a_while() -> None:
    admission = Admission(3, patience_s=2)
    read(admission, "s", "a", 2)
    admission.ask(want("s", "b", 2))
    assert admission.decide(10) == []
    assert admission.decide(11.9) == []
    (refused,) = admission.decide(12)
    assert isinstance(refused, Refuse)
    assert refused.error.details == {"needed_bytes": 2, "held_bytes": 2, "budget_bytes": 3}
    assert not admission.num_waiting


def test_a_trainer_that_lets_go_in_time_is_not_refused() -> None:
    admission = Admission(3, patience_s=2)
    read(admission, "s", "a", 2)
    admission.ask(want("s", "b", 2))
    assert admission.decide(10) == []
    admission.unpin("s", "a")
    assert admission.decide(11) == [Evict("a")]
    admission.gone("a")
    assert admission.decide(20) == [Fetch("b")]


def test_of_trainers_that_wait_for_each_other_the_newest_is_refused() -> None:
    admission = Admission(4)
    read(admission, "s", "a", 2)
    read(admission, "t", "b", 2)
    admission.ask(want("s", "c", 1))
    assert admission.decide(0) == []  # t may still let go
    admission.ask(want("u", "e", 1))
    admission.ask(want("t", "d", 1))
    (refused,) = admission.decide(0)
    assert isinstance(refused, Refuse)
    assert refused.ask.session == "t"
    admission.leave("t")
    assert admission.decide(0) == [Evict("b")]
    admission.gone("b")
    assert [type(action) for action in admission.decide(0)] == [Fetch, Fetch]


def test_a_reader_whose_room_comes_is_not_passed_by_a_smaller_one() -> None:
    admission = Admission(4)
    read(admission, "s", "a")
    admission.unpin("s", "a")
    read(admission, "s", "b", 3)  # s has let go before: it will again
    admission.ask(want("t", "c", 4))
    admission.ask(want("u", "d", 1))
    assert admission.decide(0) == []
    admission.unpin("s", "b")
    assert set(admission.decide(0)) == {Evict("a"), Evict("b")}


def test_a_reader_that_waits_for_what_nobody_lets_go_of_is_passed() -> None:
    admission = Admission(4)
    read(admission, "s", "a", 3)  # s has never let go of anything
    admission.ask(want("t", "c", 4))
    admission.ask(want("u", "d", 1))
    assert admission.decide(0) == [Fetch("d")]


def test_what_is_damaged_leaves_whoever_holds_it() -> None:
    admission = filled(1, "a")
    admission.pin("s", "a")
    assert admission.spoil("a")
    assert not admission.spoil("a")
    admission.ask(want("s", "a"))
    assert admission.decide(0) == []
    admission.gone("a")
    assert admission.decide(0) == [Fetch("a")]


SESSIONS = st.sampled_from("pqr")
KEYS = st.sampled_from([f"k{number}" for number in range(8)])
SIZES = {f"k{number}": 1 + number % 4 for number in range(8)}
BUDGET = 7


class AnyCourse(RuleBasedStateMachine):
    """Trainers that ask, release and end in any order; fetches and evictions that end whenever they like."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(BUDGET)
        self.on_disk: dict[str, int] = {}
        self.fetching: list[str] = []
        self.leaving: list[str] = []
        self.pins: set[tuple[str, str]] = set()
        self.asks: set[Ask] = set()
        self.clock = itertools.count()

    def act(self) -> None:
        actions: list[Action] = self.admission.decide(next(self.clock))
        for action in actions:
            match action:
                case Fetch(key):
                    assert key not in self.on_disk
                    assert any(ask.key == key for ask in self.asks)
                    self.on_disk[key] = SIZES[key]  # in full, from the first byte on
                    self.fetching.append(key)
                    self.asks = {ask for ask in self.asks if ask.key != key}
                case Evict(key):
                    assert key not in self.fetching
                    assert not [pin for pin in self.pins if pin[1] == key]
                    self.leaving.append(key)
                case Refuse(ask):
                    self.asks.remove(ask)
                    self.pins.discard((ask.session, ask.key))
                    self.admission.unpin(ask.session, ask.key)

    @rule(session=SESSIONS, key=KEYS, urgent=st.booleans())
    def ask(self, session: str, key: str, urgent: bool) -> None:
        if urgent:
            self.admission.pin(session, key)
            self.pins.add((session, key))
        if self.admission.state(key) not in {State.HERE, State.FETCHING}:
            wanted = want(session, key, SIZES[key], urgent=urgent)
            self.admission.ask(wanted)
            self.asks.add(wanted)
        self.act()

    @rule(session=SESSIONS, key=KEYS)
    def release(self, session: str, key: str) -> None:
        if want(session, key, SIZES[key]) not in self.asks:  # a trainer that waits for a shard does not release it
            self.admission.unpin(session, key)
            self.pins.discard((session, key))
            self.act()

    @rule(session=SESSIONS, keys=st.lists(KEYS, unique=True))
    def tell(self, session: str, keys: list[str]) -> None:
        self.admission.needs(session, keys)
        self.act()

    @rule(session=SESSIONS)
    def end(self, session: str) -> None:
        self.admission.leave(session)
        self.pins = {pin for pin in self.pins if pin[0] != session}
        self.asks = {ask for ask in self.asks if ask.session != session}
        self.act()

    @precondition(lambda self: self.fetching)
    @rule(fails=st.booleans())
    def fetch_ends(self, fails: bool) -> None:
        key = self.fetching.pop(0)
        if fails:
            del self.on_disk[key]
            self.admission.gone(key)
        else:
            self.admission.fetched(key)
        self.act()

    @precondition(lambda self: self.leaving)
    @rule()
    def eviction_ends(self) -> None:
        key = self.leaving.pop(0)
        del self.on_disk[key]
        self.admission.gone(key)
        self.act()

    @invariant()
    def never_over_the_budget(self) -> None:
        assert sum(self.on_disk.values()) <= BUDGET
        assert sum(self.on_disk.values()) == self.admission.used_bytes

    @invariant()
    def nothing_stands_still(self) -> None:
        """Something moves, or a session that is not waiting holds what is missing."""
        readers = {ask.session for ask in self.asks if ask.is_urgent}
        if not readers or self.fetching or self.leaving:
            return
        assert [session for session, key in self.pins if key in self.on_disk and session not in readers]

    def teardown(self) -> None:
        """Once everybody goes on and ends some time, all who ask are served."""
        for _ in range(200):
            while self.fetching or self.leaving:
                self.fetch_ends(fails=False) if self.fetching else self.eviction_ends()
            readers = {ask.session for ask in self.asks if ask.is_urgent}
            for session in {session for session, _ in self.pins} - readers:
                self.end(session)
            self.act()
            if not readers and not self.fetching and not self.leaving:
                break
        assert not [ask for ask in self.asks if ask.is_urgent]


TestAnyCourse = AnyCourse.TestCase
TestAnyCourse.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
