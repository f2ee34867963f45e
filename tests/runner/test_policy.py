"""When a checkpoint is due, if it can be durable in time, and when a full disk is worth another try."""

from __future__ import annotations

from pathlib import Path

import pytest

from railbus_runner.checkpointing.policy import Schedule
from railbus_runner.checkpointing.room import Room, free_bytes
from railbus_shared.contracts.jobs import CheckpointPolicy

NEVER: dict[str, object] = {"every_s": None}


def schedule(**policy: object) -> Schedule:
    return Schedule(CheckpointPolicy.parse(policy), now_s=100.0)


@pytest.mark.parametrize(
    ("policy", "step", "after_s", "due"),
    [
        (NEVER, 1000, 1e9, False),
        ({**NEVER, "every_steps": 5}, 4, 0, False),
        ({**NEVER, "every_steps": 5}, 5, 0, True),
        ({"every_s": 60}, 3, 59.9, False),
        ({"every_s": 60}, 3, 60.0, True),
        ({"every_s": 60}, 0, 60.0, False),  # there is nothing new
        ({"every_s": 60, "every_steps": 5}, 7, 60.0, True),
        ({}, 7, 599.9, False),
        ({}, 7, 600.0, True),  # what nobody has asked for
    ],
)
def test_a_checkpoint_is_due_by_steps_or_by_time_if_there_is_news(
    policy: dict[str, object], step: int, after_s: float, due: bool
) -> None:
    assert schedule(**policy).is_due(step, now_s=100.0 + after_s) is due


def test_time_counts_from_the_last_that_was_begun_and_one_that_failed_is_tried_at_the_next_due_time() -> None:
    times = schedule(every_s=60)
    times.begun(5, now_s=160.0)
    assert not times.has_news(5)
    assert not times.is_due(6, now_s=219.0)
    times.durable(5, seconds=2.0)
    times.begun(7, now_s=220.0)
    times.failed()
    assert times.has_news(6), "only what is durable counts"
    assert not times.has_news(5)
    assert not times.is_due(8, now_s=279.0)
    assert times.is_due(8, now_s=280.0)
    times.resumed(20, now_s=1000.0)
    assert (times.has_news(20), times.is_due(21, now_s=1059.0), times.is_due(21, now_s=1060.0)) == (False, False, True)


def test_the_last_few_writes_tell_whether_one_more_can_be_durable_in_time() -> None:
    times = schedule()
    assert times.expected_s is None
    assert (times.fits(0.1), times.fits(0.0), times.fits(-1.0)) == (True, False, False)
    for seconds in (40.0, 2.0, 4.0, 3.0):
        times.durable(1, seconds=seconds)
    assert times.expected_s == 5.0, "a quarter more than the slowest of three"
    assert (times.fits(5.0), times.fits(4.9)) == (True, False)


class Disk:
    """A clock and a disk."""

    def __init__(self, free: int) -> None:
        self.now_s = 0.0
        self.free = free
        self.looks = 0

    def look(self, _folder: Path) -> int:
        self.looks += 1
        return self.free

    def tries_in(self, room: Room, seconds: float) -> int:
        """How often there seemed to be room, and the try failed, in so many seconds of steps."""
        tries, end_s = 0, self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += 0.01
            if room.has_room():
                room.failed(None)
                tries += 1
        return tries


def test_a_full_disk_is_looked_at_once_a_second_and_tried_again_once_there_is_room() -> None:
    disk = Disk(10 << 20)
    room = Room(Path("m"), free=disk.look, clock_s=lambda: disk.now_s)
    assert not room.is_full
    assert room.written(5 << 20) is None
    assert room.failed(20 << 20)
    assert (room.is_full, disk.tries_in(room, 100.0)) == (True, 0)
    assert 90 <= disk.looks <= 100
    disk.free = 22 << 20
    disk.now_s += 1.0
    assert room.has_room()
    assert room.written(20 << 20) == pytest.approx(101.0, abs=0.1)
    assert not room.is_full


def test_where_room_shows_and_is_none_tries_get_rarer() -> None:
    """A quota, or a size that nobody knows."""
    disk = Disk(1 << 40)
    room = Room(Path("m"), free=disk.look, clock_s=lambda: disk.now_s)
    assert room.failed(None)
    assert not room.failed(None), "it is told once"
    assert disk.tries_in(room, 1000.0) in range(18, 24)
    assert room.written(1) is not None
    assert room.failed(None)
    disk.now_s += 1.01
    assert room.has_room()


def test_what_is_free_is_asked_of_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "models" / "m" / "checkpoints") > 0
