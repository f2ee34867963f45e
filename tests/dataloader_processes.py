"""Dataloaders as processes of their own, each a host with a root of its own, on one NATS."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from railbus_shared.bus.connection import Bus
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings
from until import PATIENCE_S, until


@dataclass
class Dataloader:
    """One that runs."""

    name: str
    layout: Layout
    process: asyncio.subprocess.Process
    log: Path
    bus: Bus

    async def ask(self, verb: str, body: dict[str, object], *, timeout_s: float = PATIENCE_S) -> dict[str, object]:
        """Ask it, by the subject of its host."""
        return await self.bus.request(f"railbus.req.data.{self.name}.{verb}", body, timeout_s=timeout_s)

    def is_ready(self) -> bool:
        assert self.process.returncode is None, self.log.read_text()
        try:
            url = json.loads((self.layout.state / "run" / "dataloader.json").read_bytes())["http_url"]
            with urllib.request.urlopen(f"{url}/readyz", timeout=2) as answer:  # noqa: S310 - our own URL
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False


@contextlib.asynccontextmanager
async def dataloader(
    common: CommonSettings, bus: Bus, root: Path, name: str, **settings: str
) -> AsyncIterator[Dataloader]:
    """A dataloader of host `name` on `root`; `settings` are of `RAILBUS_DATALOADER_*`."""
    layout, log = Layout(root), root / "dataloader.log"
    layout.datasets.mkdir(parents=True, exist_ok=True)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAILBUS_")},
        "RAILBUS_NATS_URL": common.nats_url,
        "RAILBUS_ROOT": str(root),
        "RAILBUS_HOST": name,
        "RAILBUS_RUN_DIR": str(layout.state / "run"),
        "RAILBUS_DATALOADER_HTTP_PORT": "0",
        "RAILBUS_DATALOADER_SCAN_S": "0.2",
        **{f"RAILBUS_DATALOADER_{key.upper()}": value for key, value in settings.items()},
    }
    command = [sys.executable, "-m", "railbus_dataloader"]
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=output, stderr=output)
    running = Dataloader(name, layout, process, log, bus)
    try:
        await until(running.is_ready)
        yield running
    finally:
        if process.returncode is None:
            process.terminate()
            async with asyncio.timeout(PATIENCE_S):
                await process.wait()
