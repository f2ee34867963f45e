"""A second host beside a `railbus up`: a device_manager, a dataloader and a runner of their own, on the same files."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks.running import JOBS, Running
from railbus_shared.layout import Layout

HOST: Final = "second"
_SERVICES: Final = ("dataloader", "device_manager", "runner")
_READY_S: Final = 90.0
_STOP_S: Final = 30.0


@contextlib.contextmanager
def second_host(up: Running, root: Path) -> Iterator[None]:
    """Datasets and models are those of `up`, as on a file system that hosts share."""
    layout, shared = Layout(root), Layout(up.root)
    layout.state.mkdir(parents=True)
    for name in ("datasets", "models"):
        (shared.root / name).mkdir(exist_ok=True)
        (root / name).symlink_to(shared.root / name)
    started = [_start(up, layout, service) for service in _SERVICES]
    try:
        for service in _SERVICES:
            _wait_for(layout, service)
        yield
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(_STOP_S)


def _start(up: Running, layout: Layout, service: str) -> subprocess.Popen[bytes]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAILBUS_")}
    own = {
        "NATS_URL": up.settings.nats_url,
        "NATS_KEY_FILE": str(Layout(up.root).state / "keys" / f"{service}.nk"),
        "ROOT": str(layout.root),
        "HOST": HOST,
        "RUN_DIR": str(layout.state / "run"),
        f"{service.upper()}_HTTP_PORT": "0",
        "RUNNER_ENTRYPOINT_DIRS": json.dumps([str(JOBS)]),
        "DEVICE_MANAGER_CPU_SLOTS": "1",
    }
    env = {**kept, **{f"RAILBUS_{name}": value for name, value in own.items()}}
    with (layout.root / f"{service}.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", f"railbus_{service}"], env=env, stdout=log, stderr=log)


def _wait_for(layout: Layout, service: str) -> None:
    deadline = time.monotonic() + _READY_S
    while not _is_ready(layout, service):
        assert time.monotonic() < deadline, (layout.root / f"{service}.log").read_text()[-2000:]
        time.sleep(0.1)


def _is_ready(layout: Layout, service: str) -> bool:
    try:
        url = json.loads((layout.state / "run" / f"{service}.json").read_bytes())["http_url"]
        with urllib.request.urlopen(f"{url}/readyz", timeout=2) as answer:  # noqa: S310 - our own URL
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
