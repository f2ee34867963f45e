"""Hosts of a cluster on one machine: each has a root and services of its own, as processes, on one NATS."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings
from until import PATIENCE_S, until

TRAINING = ("dataloader", "device_manager", "runner")
"""What a host needs to run jobs."""


@dataclass
class Host:
    """A host with the services that run on it."""

    name: str
    layout: Layout
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)

    def log(self, service: str) -> Path:
        return self.layout.root / f"{service}.log"

    def are_ready(self) -> bool:
        return all(self.is_ready(service) for service in self.processes)

    def is_ready(self, service: str) -> bool:
        assert self.processes[service].returncode is None, self.log(service).read_text()
        try:
            url = json.loads((self.layout.state / "run" / f"{service}.json").read_bytes())["http_url"]
            with urllib.request.urlopen(f"{url}/readyz", timeout=2) as answer:  # noqa: S310 - our own URL
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False


@contextlib.asynccontextmanager
async def running_host(
    common: CommonSettings,
    root: Path,
    name: str,
    services: tuple[str, ...],
    *,
    launcher: tuple[str, ...] = (sys.executable, "-m"),
    env: Mapping[str, str] | None = None,
    settings: Mapping[str, str] | None = None,
) -> AsyncIterator[Host]:
    """Ready services of host `name` on `root`; `settings` are of `RAILBUS_*`, `launcher` runs modules."""
    host = Host(name, Layout(root))
    host.layout.datasets.mkdir(parents=True, exist_ok=True)
    own = {"NATS_URL": common.nats_url, "ROOT": str(root), "HOST": name, "RUN_DIR": str(host.layout.state / "run")}
    own |= {f"{service.upper()}_HTTP_PORT": "0" for service in services} | {"DATALOADER_SCAN_S": "0.2"}
    own |= {key.upper(): value for key, value in (settings or {}).items()}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAILBUS_")}
    environment = {**kept, **{f"RAILBUS_{key}": value for key, value in own.items()}, **(env or {})}
    try:
        for service in services:
            command = [*launcher, f"railbus_{service}"]
            with host.log(service).open("ab") as output:
                host.processes[service] = await asyncio.create_subprocess_exec(
                    *command, env=environment, stdout=output, stderr=output
                )
        await until(host.are_ready)
        yield host
    finally:
        for service in reversed(services):  # the runner first: it hands back what the others look after
            await _ended(host.processes.get(service))


async def _ended(process: asyncio.subprocess.Process | None) -> None:
    if process is not None and process.returncode is None:
        process.terminate()
        async with asyncio.timeout(PATIENCE_S):
            await process.wait()
