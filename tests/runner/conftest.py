"""One pre-warmed process for all tests that fork trainers and leave it as it was: to import torch takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trainers import WarmHost


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmHost]:
    """Of this process of the tests; whoever arms or kills one makes its own."""
    host = WarmHost()
    yield host
    host.close()
