"""The stack of compose.yaml as it is, and what a user can do with it and see of it from the host."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import subprocess
import tarfile
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import nats
import nats.errors
import pytest
from nats.aio.client import Client

from until import until

REPOSITORY = Path(__file__).parents[1]
SERVICES = {"device_manager": 8701, "dataloader": 8702, "runner": 8703, "telemetry": 8704}
FINAL = {"succeeded", "failed", "cancelled"}
LEASE_TTL_S = 5

_KILL = "import psutil; psutil.Process(1).children()[0].kill()"
_PROCESSES = """
import os, psutil
others = [each for each in psutil.process_iter(["cmdline"]) if each.pid != os.getpid()]  # without those that are gone
print(*(" ".join(each.info["cmdline"] or ["?"]) for each in others), sep="\\n")
"""


@dataclass(frozen=True)
class Stack:
    """One project of containers, with ports and keys of its own."""

    project: str
    override: Path
    deploy: Path
    """Stands for the checkout's `deploy`: where `init` puts the keys."""
    ports: Mapping[str, int]
    """On this host, of each service and of NATS; fixed, because a free one would be another after each restart."""
    tag: str
    listen: str = "127.0.0.1"
    """Address of this host at which NATS is published."""

    # --- commands ----------------------------------------------------------------------------------------------------

    def compose(self, *arguments: str, timeout_s: float = 120, statuses: tuple[int, ...] = (0,)) -> str:
        """What `docker compose ...` prints; fails the test with what it said and what the containers logged."""
        done = self._run(self.command(*arguments), timeout_s=timeout_s)
        if done.returncode not in statuses:
            said = done.stderr.decode(errors="replace")[-4000:]
            pytest.fail(f"docker compose {' '.join(arguments)}: status {done.returncode}\n{said}\n{self.story()}")
        return done.stdout.decode(errors="replace").strip()

    def command(self, *arguments: str) -> list[str]:
        return ["docker", "compose", "-p", self.project, "-f", "compose.yaml", "-f", str(self.override), *arguments]

    def _run(self, command: list[str], *, timeout_s: float) -> subprocess.CompletedProcess[bytes]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAILBUS_")}
        env = {**kept, "COMPOSE_PARALLEL_LIMIT": "1", "RAILBUS_DEPLOY": str(self.deploy), "RAILBUS_TAG": self.tag}
        env["NATS_LISTEN"] = self.listen
        env |= {f"{name.upper()}_PORT": str(port) for name, port in self.ports.items()}
        return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, timeout=timeout_s, check=False)

    def story(self) -> str:
        """Which containers there are and what they logged last, for whoever looks for a fault."""
        told = [self._run(self.command(*words), timeout_s=60) for words in (["ps", "-a"], ["logs", "--tail", "60"])]
        return "\n".join(done.stdout.decode(errors="replace") for done in told)[-12_000:]

    def up(self) -> None:
        self.compose("up", "--detach", "--wait", "--wait-timeout", "240", timeout_s=300)

    # --- containers --------------------------------------------------------------------------------------------------

    def inside(self, service: str, code: str) -> str:
        """What Python prints inside a service's container."""
        return self.compose("exec", "-T", service, "python", "-c", code)

    def inspect(self, service: str) -> dict[str, Any]:
        """The container's state, as the engine tells it."""
        container = self.compose("ps", "--all", "--quiet", service)
        return dict(json.loads(self._run(["docker", "inspect", container], timeout_s=30).stdout)[0])

    def kill(self, service: str) -> None:
        """SIGKILL to the service itself, not by the engine: that would count as a person's wish, and stay down."""
        if service == "nats":
            self.compose("exec", "-T", service, "sh", "-c", "kill -9 $(pidof nats-server)", statuses=(0, 137))
        else:
            self.compose("exec", "-T", service, "python", "-c", _KILL, statuses=(0, 137))

    def is_healthy(self, service: str, *, restarts: int) -> bool:
        """Whether it runs, was restarted so often, and its health check says so of this run of it."""
        found = self.inspect(service)
        return bool(found["RestartCount"] == restarts and found["State"].get("Health", {}).get("Status") == "healthy")

    def processes(self, service: str) -> list[str]:
        """Command lines inside a container, but for the one that looks."""
        return self.inside(service, _PROCESSES).splitlines()

    def get(self, service: str, path: str) -> int:
        """Status of a GET from the host."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[service]}{path}", timeout=15) as answer:
            return int(answer.status)

    def files(self, folder: str) -> dict[str, bytes]:
        """Files below a folder of the root, by their paths; also while everything is stopped."""
        done = self._run(self.command("cp", f"telemetry:/learning/{folder}", "-"), timeout_s=120)
        assert done.returncode == 0, done.stderr
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            members = [member for member in archive if member.isfile()]
            return {member.name: cast("IO[bytes]", archive.extractfile(member)).read() for member in members}

    # --- the bus, from the host --------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"nats://{self.listen}:{self.ports['nats']}"

    def seed(self, user: str = "user") -> str:
        return (self.deploy / "keys" / f"{user}.nk").read_text().strip()

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """A plain NATS client on the host, with the user's key."""
        client = await nats.connect(self.url, nkeys_seed_str=self.seed(), error_cb=_ignore)
        try:
            yield client
        finally:
            await client.close()

    async def publish(self, job: dict[str, Any]) -> None:
        """As `nats pub railbus.jobs.submit` does, but that the stream's acknowledgement is awaited."""
        async with self.client() as client:
            answer = json.loads(
                (await client.request("railbus.jobs.submit", json.dumps(job).encode(), timeout=20)).data
            )
        assert answer["seq"] >= 1, answer

    async def ask(self, subject: str, body: dict[str, Any]) -> dict[str, Any]:
        """A request in JSON, tried again while nobody can answer it."""
        async with asyncio.timeout(60):
            while True:
                try:
                    async with self.client() as client:
                        answer = await client.request(f"railbus.req.{subject}", json.dumps(body).encode(), timeout=5)
                        return dict(json.loads(answer.data))
                except (nats.errors.Error, OSError):
                    await asyncio.sleep(0.2)

    async def record(self, job: str) -> dict[str, Any]:
        return await self.ask("jobs.get", {"id": job})

    async def ended(self, job: str, *, seconds: float = 180) -> dict[str, Any]:
        """The job's record, once it is final."""
        await until(lambda: self.has(job, lambda record: record.get("state") in FINAL), seconds=seconds)
        return await self.record(job)

    async def has_checkpoint(self, job: str, *, after: int = 0) -> dict[str, Any]:
        """The running job's record, once it names a checkpoint beyond a step."""

        def saved(record: dict[str, Any]) -> bool:
            assert record.get("state") not in FINAL, record
            return record.get("state") == "running" and ((record.get("checkpoint") or {}).get("step") or 0) > after

        await until(lambda: self.has(job, saved), seconds=120)
        return await self.record(job)

    async def has(self, job: str, claim: Callable[[dict[str, Any]], bool]) -> bool:
        await asyncio.sleep(0.2)
        return claim(await self.record(job))


async def _ignore(error: Exception) -> None:
    """Connections break in these tests; what matters is what is asked afterwards."""
