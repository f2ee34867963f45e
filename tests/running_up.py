"""A real `railbus up` on a root of its own, and what a user sees of it: the bus, the files, the health endpoints."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import Client as NatsClient

from railbus.client import Client
from railbus.embedded.supervisor import READY_S
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings, running_bus
from until import PATIENCE_S

SERVICES = ("device_manager", "dataloader", "runner", "telemetry")

PACED = '''
"""A training loop that takes its time, so that a test can interrupt it."""

import hashlib
import time

import torch


def train(ctx):
    model = torch.nn.Linear(64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    stream = ctx.stream("train", batch_size=100)
    ctx.track(model=model, optimizer=optimizer)
    ctx.resume()
    for _ in stream.epochs(int(ctx.params.get("epochs", 4))):
        for batch in stream:
            noise = torch.rand(len(batch["label"]), 64) * 0.1
            logits = model(batch["image"].flatten(1) + noise)
            loss = torch.nn.functional.cross_entropy(logits, batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            time.sleep(float(ctx.params.get("pause_s", 0.02)))
            ctx.step(loss=loss)
    weights = b"".join(t.numpy().tobytes() for t in model.state_dict().values())
    ctx.event("weighed", sha256=hashlib.sha256(weights).hexdigest())


def fail(ctx):
    raise RuntimeError("no luck today")


def leave(ctx):
    raise SystemExit(int(ctx.params["code"]))
'''


@dataclass
class RunningUp:
    """The supervisor's process and where to find what it runs."""

    root: Path
    process: subprocess.Popen[bytes]
    output: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        return Layout(self.root)

    @property
    def settings(self) -> CommonSettings:
        found = running_bus(self.layout)
        assert found is not None, self.output.read_text()
        return found

    def pid_of(self, service: str) -> int:
        if service == "nats":
            return int((self.layout.state / "nats" / "nats-server.pid").read_text())
        return int(json.loads((self.layout.state / "run" / f"{service}.json").read_bytes())["pid"])

    def kill(self, service: str, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid_of(service), number)

    def url(self, service: str) -> str:
        return str(json.loads((self.layout.state / "run" / f"{service}.json").read_bytes())["http_url"])

    def get(self, service: str, path: str) -> tuple[int, str]:
        """Status and text of a GET; 0 if nobody answers."""
        try:
            with urllib.request.urlopen(f"{self.url(service)}{path}", timeout=6) as answer:  # noqa: S310 - our own URL
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as exc:
            return exc.code, exc.read().decode()
        except OSError:
            return 0, ""

    def is_ready(self) -> bool:
        try:
            return all(self.get(service, "/readyz")[0] == 200 for service in SERVICES)
        except FileNotFoundError:
            return False

    def wait_until(self, claim: Callable[[], bool], *, timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not claim():
            assert self.process.poll() is None, f"railbus up has ended:\n{self.output.read_text()}"
            assert time.monotonic() < deadline, f"{what} within {timeout_s} s:\n{self.logs()}"
            time.sleep(0.05)

    def wait_until_ready(self) -> None:
        """Every service; where one is late, the supervisor ends before this does, and says which and why."""
        self.wait_until(self.is_ready, timeout_s=READY_S + PATIENCE_S, what="all services ready")

    def logs(self) -> str:
        files = sorted((self.layout.state / "run").glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in files)

    def stop(self) -> int:
        """Drain, and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(PATIENCE_S)
            raise AssertionError(f"railbus up did not stop:\n{self.logs()}") from None

    def log_lines(self) -> list[dict[str, Any]]:
        return log_lines(self.layout)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with Client.connect(self.settings) as client:
            yield client

    @asynccontextmanager
    async def raw_client(self) -> AsyncIterator[NatsClient]:
        """A NATS client that is not ours."""
        settings = self.settings
        assert settings.nats_key_file is not None
        client = await nats.connect(settings.nats_url, nkeys_seed_str=settings.nats_key_file.read_text().strip())
        try:
            yield client
        finally:
            await client.close()


def log_lines(layout: Layout) -> list[dict[str, Any]]:
    """Every event in the logs tree, closed periods and the open one."""
    lines: list[dict[str, Any]] = []
    for path in sorted(layout.logs.rglob("trainer.log.jsonl*")):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines += [json.loads(line) for line in data.splitlines()]
    return lines


def start_up(
    folder: Path, *arguments: str, env: dict[str, str] | None = None, launcher: tuple[str, ...] = ("-m",)
) -> RunningUp:
    """Start `railbus up` on `<folder>/learning` with free ports; returns at once. `launcher` runs the module."""
    root = folder / "learning"
    entrypoints = folder / "entrypoints"
    entrypoints.mkdir(exist_ok=True)
    (entrypoints / "paced.py").write_text(PACED)
    command = [sys.executable, *launcher, "railbus.cli.main", "--root", str(root), "up", "--nats-port", "0"]
    command += ["--http-port-base", "0", "--entrypoints", str(entrypoints), *arguments]
    output = folder / "up.txt"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAILBUS_")}
    with output.open("ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**kept, **(env or {})}, start_new_session=True
        )
    return RunningUp(root, process, output)


async def until_event(
    client: Client, job: str, kind: str, *, count: int = 1, timeout_s: float = READY_S
) -> dict[str, object]:
    """The `count`-th event of a kind of a job."""
    async with asyncio.timeout(timeout_s):
        async for event in client.follow(job):
            if event["type"] == kind:
                count -= 1
                if count == 0:
                    return event
    raise AssertionError(f"job {job} ended without {kind}: {await client.job(job)}")


async def finished(client: Client, job: str, *, timeout_s: float = READY_S) -> list[dict[str, object]]:
    """All events of a job up to its end; it may have to wait until a runner that was killed is ready again."""
    async with asyncio.timeout(timeout_s):
        return [event async for event in client.follow(job)]
