"""A server that is stuck after a full disk is told apart from one whose disk is full."""

from __future__ import annotations

from pathlib import Path

import pytest

from railbus.embedded.server_config import ServerFiles
from railbus.embedded.store_watch import LOOK_S, StoreWatch

REFUSED = "[ERR] JetStream failed to store a msg on stream 'x': write 1.blk: no space left on device\n"


def _say(where: ServerFiles, text: str) -> None:
    with where.log.open("a") as log:
        log.write(text)


def test_only_a_refusal_while_there_has_been_room_for_a_whole_look_means_stuck(tmp_path: Path) -> None:
    where = ServerFiles(tmp_path)
    watch = StoreWatch(where)
    assert not watch.is_stuck(0)  # there is no log
    _say(where, f"[INF] Server is ready\n{REFUSED}")
    assert not watch.is_stuck(LOOK_S / 2)  # it has just looked
    assert watch.is_stuck(LOOK_S)
    assert not watch.is_stuck(2 * LOOK_S)  # nothing new


def test_while_the_disk_is_full_and_at_the_first_look_with_room_it_is_not_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ServerFiles(tmp_path)
    watch = StoreWatch(where)
    with monkeypatch.context() as full:
        full.setattr("railbus.embedded.store_watch.ROOM_BYTES", 1 << 62)
        for look in range(3):
            _say(where, REFUSED)
            assert not watch.is_stuck(look * LOOK_S)
    _say(where, REFUSED)
    assert not watch.is_stuck(3 * LOOK_S)
    _say(where, REFUSED)
    assert watch.is_stuck(4 * LOOK_S)


def test_a_log_that_was_cut_is_read_from_its_new_end_on(tmp_path: Path) -> None:
    where = ServerFiles(tmp_path)
    watch = StoreWatch(where)
    _say(where, "x" * 1000)
    watch.is_stuck(0)
    where.log.write_text("")
    assert not watch.is_stuck(LOOK_S)
    _say(where, REFUSED)
    assert watch.is_stuck(2 * LOOK_S)
