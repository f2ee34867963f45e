"""One `railbus up` for the tests that leave it whole, and one of its own for each test that breaks it.

What was told meanwhile must stand in the catalogue of events, each name in its data too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import fail_points
from railbus.importing import import_dataset
from railbus_shared.catalogue import undocumented
from railbus_shared.layout import Layout
from running_up import RunningUp, start_up

SHORT = {"RAILBUS_LEASE_TTL_S": "6", "RAILBUS_HEARTBEAT_S": "1"}
"""A host's report lives for five heartbeats: less, and on a busy machine its devices are not listed for a moment."""


def _running(folder: Path, *, launcher: tuple[str, ...] = ("-m",), **settings: str) -> Iterator[RunningUp]:
    import_dataset(Layout(folder / "learning"), "digits")
    up = start_up(folder, env={**SHORT, **settings}, launcher=launcher)
    try:
        up.wait_until_ready()
        yield up
    finally:
        status = up.stop()
    assert status == 0, up.output.read_text() + up.logs()
    assert undocumented(up.log_lines()) == []


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningUp]:
    yield from _running(tmp_path_factory.mktemp("up"))


@pytest.fixture(scope="module")
def failing_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningUp]:
    """Its services kill themselves at points that are armed in the folder above its root."""
    folder = tmp_path_factory.mktemp("up")
    yield from _running(folder, launcher=(fail_points.__file__,), FAIL_POINTS=str(folder))


@pytest.fixture
def fragile_up(tmp_path: Path) -> Iterator[RunningUp]:
    yield from _running(tmp_path)


@pytest.fixture(scope="module")
def two_slots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningUp]:
    """Two jobs at a time, whatever the machine."""
    yield from _running(tmp_path_factory.mktemp("up"), RAILBUS_DEVICE_MANAGER_CPU_SLOTS="2")


@pytest.fixture
def hasty_up(tmp_path: Path) -> Iterator[RunningUp]:
    """Leases live for two seconds."""
    yield from _running(tmp_path, RAILBUS_LEASE_TTL_S="2")
