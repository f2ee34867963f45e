"""Sessions without I/O: moved by what a trainer says, ended by silence, made again after a restart."""

from __future__ import annotations

import pytest

from railbus_dataloader.sessions import Session, Sessions, window
from railbus_shared.contracts.requests import StreamProgress
from railbus_shared.errors import InvalidField


def told(
    *,
    ahead: tuple[int, ...] = (),
    held: tuple[int, ...] = (),
    released: tuple[int, ...] = (),
    dataset: str | None = None,
    number: int = 0,
) -> StreamProgress:
    return StreamProgress(stream="s", dataset=dataset, number=number, ahead=ahead, held=held, released=released)


@pytest.fixture
def sessions() -> Sessions:
    return Sessions(ttl_s=10)


def test_a_trainers_word_moves_its_session(sessions: Sessions) -> None:
    sessions.heard("s", "d", now_s=0).held = {1, 2}
    moved = sessions.moved(told(ahead=(3, 4, 3), released=(1, 7)), now_s=1)
    assert moved is not None
    session, released = moved
    assert (session.ahead, session.held, released) == ((3, 4), {2}, frozenset({1}))
    sessions.moved(told(ahead=(4,)), now_s=2)
    assert session.ahead == (4,)


def test_what_is_held_again_before_its_release_was_told_stays_held(sessions: Sessions) -> None:
    sessions.heard("s", "d", now_s=0).held = {1}
    moved = sessions.moved(told(held=(1,), released=(1,)), now_s=1)
    assert moved is not None
    assert (moved[0].held, moved[1]) == ({1}, frozenset())


def test_a_word_that_comes_after_a_later_one_is_a_sign_of_life_and_nothing_else(sessions: Sessions) -> None:
    session = sessions.heard("s", "d", now_s=0)
    sessions.moved(told(held=(1,), number=1), now_s=1)
    sessions.moved(told(ahead=(3,), held=(2,), released=(1,), number=3), now_s=2)
    assert sessions.moved(told(ahead=(2,), held=(1,), released=(2,), number=2), now_s=3) is None
    assert (session.ahead, session.held, session.heard_s) == ((3,), {2}, 3)
    assert sessions.moved(told(released=(2,), number=3), now_s=4) == (session, frozenset({2}))  # the same, sent twice


def test_a_word_of_a_stream_that_is_not_known_makes_its_session_again(sessions: Sessions) -> None:
    assert sessions.moved(told(ahead=(1,), held=(0,)), now_s=0) is None  # of which dataset?
    moved = sessions.moved(told(ahead=(1,), held=(0,), dataset="d"), now_s=0)
    assert moved is not None
    assert (moved[0].dataset, moved[0].ahead, moved[0].held) == ("d", (1,), {0})


def test_a_stream_of_one_dataset_is_no_stream_of_another(sessions: Sessions) -> None:
    sessions.heard("s", "d", now_s=0)
    with pytest.raises(InvalidField, match="it reads dataset 'd', not 'e'"):
        sessions.moved(told(dataset="e"), now_s=0)


def test_a_session_ends_when_it_is_closed_or_silent_for_too_long(sessions: Sessions) -> None:
    for stream in ("a", "b", "c"):
        sessions.heard(stream, "d", now_s=0)
    assert sessions.close("a") is not None
    assert sessions.close("a") is None
    sessions.heard("b", "d", now_s=5)
    assert [one.stream for one in sessions.expired(9.9)] == []
    assert [one.stream for one in sessions.expired(10)] == ["c"]
    assert [one.stream for one in sessions.expired(15)] == ["b"]
    assert len(sessions) == 0


def test_of_too_many_sessions_those_that_were_silent_longest_end(sessions: Sessions) -> None:
    for number in range(1030):
        sessions.heard(f"s{number}", "d", now_s=number / 1000)
    assert [one.stream for one in sessions.expired(1.03)] == [f"s{number}" for number in range(6)]


@pytest.mark.parametrize(
    ("ahead", "held", "share", "expected"),
    [
        ((2, 0, 1), set(), 100, [2, 0, 1]),
        ((2, 0, 1), set(), 20, [2, 0]),
        ((2, 0, 1), set(), 19, [2]),
        ((2, 0, 1), set(), 0, [2]),
        ((2, 0, 1), {2}, 10, [0]),
        ((0, 1, 2), {0, 1, 2}, 10, []),
        ((7, 1), set(), 10, [1]),
        ((), set(), 10, []),
    ],
)
def test_a_session_looks_ahead_as_far_as_its_share_reaches(
    ahead: tuple[int, ...], held: set[int], share: int, expected: list[int]
) -> None:
    session = Session("s", "d", 0, ahead, held)
    assert window(session, [10, 10, 10], share_bytes=share) == expected
