"""One `railbus up` on this machine's GPUs for all of these tests; without a GPU they are skipped."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from railbus.importing import import_dataset
from railbus_shared.layout import Layout
from running_up import RunningUp, start_up

SETTINGS = {
    "RAILBUS_LEASE_TTL_S": "6",
    "RAILBUS_HEARTBEAT_S": "0.5",
    "RAILBUS_DEVICE_MANAGER_GPU_SHARES": "2",
    "RAILBUS_DEVICE_MANAGER_CPU_SLOTS": "0",
}


def _missing() -> str:
    """What this machine lacks for tests on a GPU."""
    try:
        if ctypes.CDLL("libnvidia-ml.so.1").nvmlInit_v2() != 0:
            return "NVML does not answer"
    except OSError:
        return "no NVIDIA driver"
    import torch

    return "" if torch.cuda.is_available() else f"torch {torch.__version__} can use no GPU here"


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningUp]:
    if missing := _missing():
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("gpu")
    import_dataset(Layout(folder / "learning"), "digits")
    started = start_up(folder, env=SETTINGS)
    shutil.copy(Path(__file__).parents[1] / "entrypoints" / "on_gpu.py", folder / "entrypoints")
    try:
        started.wait_until_ready()
        yield started
    finally:
        status = started.stop()
    assert status == 0, started.output.read_text() + started.logs()
