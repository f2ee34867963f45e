"""A real nats-server for each test that asks for one: a free port, JetStream, the durability that users get."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from railbus_shared.bus import topology
from railbus_shared.bus.connection import Bus
from railbus_shared.settings import CommonSettings
from servers import Server

# No test times speed: on a busy machine an example may take a second, and so may making one.
settings.register_profile("railbus", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("railbus")


BESIDE_OTHERS = 3
"""How many times longer a test may take where others run at the same time; a timeout ends only what hangs."""


def pytest_configure() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would all that the tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no process has a long test left when the others are done."""
    items.sort(key=lambda item: item.path.parent.name != "e2e")
    if "PYTEST_XDIST_WORKER" in os.environ:
        for item in items:
            mark = item.get_closest_marker("timeout")
            if mark is not None:
                item.add_marker(pytest.mark.timeout(BESIDE_OTHERS * mark.args[0]), append=False)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "nats"
    folder.mkdir()
    running = Server(folder)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def common(server: Server, tmp_path: Path) -> CommonSettings:
    """Settings of a process on the test's server, with short lives and periods."""
    return CommonSettings(
        root=tmp_path / "learning", nats_url=server.url, host="testhost", lease_ttl_s=2, heartbeat_s=0.3
    )


@pytest.fixture
async def bus(common: CommonSettings) -> AsyncIterator[Bus]:
    """A connection to a server on which everything exists."""
    async with Bus.open(common, name="test") as opened:
        await topology.ensure(opened, common.layout.state / "store.json")
        yield opened
