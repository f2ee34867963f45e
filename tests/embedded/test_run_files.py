"""The lock and the file by which clients find a running `railbus up`."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from railbus.embedded.run_files import BusFile, RunPaths, acquire, read_bus, write_bus
from railbus_shared.errors import AlreadyRunning, BadSetting
from railbus_shared.layout import Layout
from railbus_shared.settings import running_bus

BUS = BusFile("nats://127.0.0.1:4222", "/keys", "/keys/user.nk", 4711, "2026-01-01T00:00:00.000000000Z")


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    made = RunPaths(tmp_path)
    made.make()
    return made


def test_it_is_read_as_long_as_the_lock_is_held(paths: RunPaths) -> None:
    lock = acquire(paths)
    assert read_bus(paths.root) is None
    write_bus(paths, BUS)
    assert read_bus(paths.root) == BUS
    lock.close()
    assert read_bus(paths.root) is None


def test_clients_settings_read_the_same_file(paths: RunPaths) -> None:
    write_bus(paths, BUS)
    settings = running_bus(Layout(paths.root))
    assert settings is not None
    assert settings.nats_url == BUS.url
    assert str(settings.nats_key_file) == BUS.user_key_file


def test_a_root_on_which_nothing_ever_ran_has_no_bus(tmp_path: Path) -> None:
    assert read_bus(tmp_path / "nowhere") is None
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b"{}", b'{"url": "nats://x"}', b"\xff", json.dumps({"pid": "x"}).encode()],
)
def test_a_damaged_file_is_named(paths: RunPaths, content: bytes) -> None:
    paths.bus.write_bytes(content)
    with pytest.raises(BadSetting, match=r"bus\.json is damaged"):
        read_bus(paths.root)


def test_the_second_is_refused_with_process_and_url_of_the_first(paths: RunPaths) -> None:
    lock = acquire(paths)
    write_bus(paths, BUS)
    with pytest.raises(AlreadyRunning, match=rf"process {os.getpid()}, NATS at {BUS.url}"):
        acquire(paths)
    lock.close()
    acquire(paths).close()


def test_the_second_is_refused_also_before_the_first_is_ready(paths: RunPaths) -> None:
    lock = acquire(paths)
    with pytest.raises(AlreadyRunning, match=f"process {os.getpid()}"):
        acquire(paths)
    lock.close()


def test_a_reader_that_looks_at_the_lock_does_not_stop_a_start(paths: RunPaths) -> None:
    """For an instant, or for longer where it is halted just then."""
    acquire(paths).close()
    reader = os.open(paths.lock, os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    let_go = threading.Timer(0.5, os.close, [reader])
    let_go.start()
    acquire(paths).close()
    let_go.join()


def test_what_others_must_not_read_is_private(paths: RunPaths) -> None:
    lock = acquire(paths)
    write_bus(paths, BUS)
    for path in (paths.nats, paths.run, paths.bus, paths.lock):
        assert path.stat().st_mode & 0o077 == 0, path
    lock.close()
