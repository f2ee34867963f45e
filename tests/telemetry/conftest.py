"""A root for the log, and a clock that tests set."""

from __future__ import annotations

from pathlib import Path

import pytest

from railbus_shared.layout import Layout
from written_logs import Clock


@pytest.fixture
def now() -> Clock:
    return Clock()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "learning")
