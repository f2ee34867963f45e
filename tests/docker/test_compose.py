"""The Dockerfile and compose.yaml as they are: built, started, used from the host, hurt, stopped and started again.

It is one story, because building and starting takes a minute or more. The images keep their tag `test` afterwards, so
that the next run builds only what has changed; containers, networks and volumes are removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import os
import subprocess
import tarfile
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import msgpack
import nats
import pytest
from nats.aio.client import Client

REPOSITORY = Path(__file__).parents[2]
SERVICES = {"device_manager": 8701, "dataloader": 8702, "runner": 8703, "telemetry": 8704}
ENDS = {"job.succeeded", "job.failed", "job.cancelled"}

OWN_CODE = '''
"""A user's own training code, which takes its time."""

import time

import torch


def train(ctx):
    model = torch.nn.Linear(128, 1)
    optimizer = torch.optim.Adam(model.parameters())
    stream = ctx.stream("train", batch_size=64)
    ctx.track(model=model, optimizer=optimizer)
    ctx.resume()
    for _ in stream.epochs(2):
        for batch in stream:
            loss = model(batch["tokens"][:, :128].float() / 256).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            time.sleep(0.05)
            ctx.step(loss=loss)
'''

OVERRIDE = """
services:
  runner:
    volumes: ["{folder}:/entrypoints:ro"]
    environment:
      RAILBUS_RUNNER_ENTRYPOINT_DIRS: '["/entrypoints"]'
"""


@dataclass(frozen=True)
class Stack:
    """One project of containers, with ports of its own."""

    project: str
    override: Path

    def compose(self, *arguments: str, timeout_s: float = 120, statuses: tuple[int, ...] = (0,)) -> bytes:
        """Output of `docker compose ...`; fails the test with what it said and what the containers logged."""
        command = ["docker", "compose", "-p", self.project, "-f", "compose.yaml", "-f", str(self.override), *arguments]
        done = self._run(command, timeout_s=timeout_s)
        if done.returncode not in statuses:
            logs = self._run([*command[: -len(arguments)], "logs", "--no-color", "--tail", "40"], timeout_s=60)
            said = (done.stderr + logs.stdout)[-8000:].decode(errors="replace")
            pytest.fail(f"docker compose {' '.join(arguments)}: status {done.returncode}\n{said}")
        return done.stdout

    def _run(self, command: list[str], *, timeout_s: float) -> subprocess.CompletedProcess[bytes]:
        ports = dict.fromkeys(("NATS_PORT", *(f"{name.upper()}_PORT" for name in SERVICES)), "0")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAILBUS_")}
        env = {**kept, **ports, "RAILBUS_TAG": "test", "COMPOSE_PARALLEL_LIMIT": "1"}
        return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, timeout=timeout_s, check=False)

    def up(self) -> None:
        self.compose("up", "--detach", "--wait", "--wait-timeout", "180", timeout_s=240)

    def python(self, service: str, code: str) -> str:
        """What a line of Python prints inside a service's container."""
        return self.compose("exec", "-T", service, "python", "-c", code).decode().strip()

    def address(self, service: str, port: int) -> str:
        """Where a container's port is published on this host."""
        return self.compose("port", service, str(port)).decode().strip()

    def state(self, service: str) -> dict[str, Any]:
        """The container's, as the engine tells it."""
        container = self.compose("ps", "--all", "--quiet", service).decode().strip()
        done = self._run(["docker", "inspect", container], timeout_s=30)
        return dict(json.loads(done.stdout)[0])

    def learning(self, folder: str) -> dict[str, bytes]:
        """Files below a folder of the root, by their paths; also of a container that is stopped."""
        return self._copied("telemetry", f"/learning/{folder}")

    def seed(self) -> str:
        return self._copied("init", "/deploy/keys/user.nk")["user.nk"].decode().strip()

    def _copied(self, service: str, path: str) -> dict[str, bytes]:
        with tarfile.open(fileobj=io.BytesIO(self.compose("cp", f"{service}:{path}", "-"))) as archive:
            files = [member for member in archive if member.isfile()]
            return {member.name: cast("IO[bytes]", archive.extractfile(member)).read() for member in files}

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """A NATS client on the host, with the user's key."""
        client = await nats.connect(f"nats://{self.address('nats', 4222)}", nkeys_seed_str=self.seed())
        try:
            yield client
        finally:
            await client.close()


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """Built, and gone afterwards; skips where no Docker engine answers."""
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        try:
            subprocess.run(command, capture_output=True, timeout=20, check=True)
        except (FileNotFoundError, subprocess.SubprocessError) as exc:
            pytest.skip(f"`{' '.join(command)}` does not answer: {exc}")
    code = tmp_path / "entrypoints"
    code.mkdir()
    (code / "own.py").write_text(OWN_CODE)
    tmp_path.chmod(0o755)
    override = tmp_path / "override.yaml"
    override.write_text(OVERRIDE.format(folder=code))
    stack = Stack(f"railbus-test-{os.getpid()}", override)
    try:
        stack.compose("config", "--quiet")
        stack.compose("build", timeout_s=1200)
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout", "5")


@pytest.mark.docker
@pytest.mark.timeout(1800)  # the images are built, and torch is installed into one of them
async def test_a_deployment_in_containers_trains_survives_a_crash_and_drains(stack: Stack) -> None:
    stack.up()
    _nothing_in_it_has_power_over_the_host(stack)
    _its_services_answer_on_published_ports_and_nothing_else_does(stack)
    stack.compose("exec", "-T", "dataloader", "railbus", "dataset", "import", "pydocs")

    events = await _run(stack, {"id": "small", "entrypoint": "causal_lm", "params": _SMALL})
    assert events[-1]["type"] == "job.succeeded", events[-1]
    await _a_crashed_runner_comes_back_and_continues_the_job(stack)
    seed, last_job = stack.seed(), await _stop_in_the_middle_of_a_job(stack)
    _everything_was_written_down_and_closed(stack, last_job)

    stack.up()
    assert stack.seed() == seed
    events = await _follow(stack, last_job)
    assert events[-1]["type"] == "job.succeeded", events[-1]
    assert any(event["type"] == "checkpoint.resumed" for event in events)


_SMALL = {"layers": 1, "heads": 1, "width": 16, "batch_size": 8, "steps": 20, "eval_every": 20, "sample_chars": 20}


def _nothing_in_it_has_power_over_the_host(stack: Stack) -> None:
    for service in (*SERVICES, "nats"):
        host = stack.state(service)["HostConfig"]
        assert (host["ReadonlyRootfs"], host["CapDrop"], host["Privileged"]) == (True, ["ALL"], False), service
        assert "no-new-privileges:true" in host["SecurityOpt"], service
        assert stack.compose("exec", "-T", service, "id", "-u").decode().strip() == "10001", service
    folders = ("/", "/etc", "/opt/railbus", "/deploy", "/deploy/keys")
    writable = f"import os; print([path for path in {folders} if os.access(path, os.W_OK)])"
    assert all(stack.python(service, writable) == "[]" for service in SERVICES)


def _its_services_answer_on_published_ports_and_nothing_else_does(stack: Stack) -> None:
    for service, port in SERVICES.items():
        address = stack.address(service, port)
        assert address.startswith("127.0.0.1:")
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=5) as answer:
            assert answer.status == 200
    assert stack.address("nats", 4222).startswith("127.0.0.1:")
    published = {port for port, at in stack.state("nats")["NetworkSettings"]["Ports"].items() if at}
    assert published == {"4222/tcp"}


async def _a_crashed_runner_comes_back_and_continues_the_job(stack: Stack) -> None:
    def crash() -> None:
        kill = "import psutil; psutil.Process(1).children()[0].kill()"  # which may end with its container
        stack.compose("exec", "-T", "runner", "python", "-c", kill, statuses=(0, 137))

    events = await _run(stack, _paced("crashed"), at_checkpoint=crash)
    assert stack.state("runner")["RestartCount"] == 1
    types = [event["type"] for event in events]
    assert types[-1] == "job.succeeded", events[-1]
    assert types.count("job.started") == 2
    assert types.index("job.requeued") < types.index("checkpoint.resumed")


async def _stop_in_the_middle_of_a_job(stack: Stack) -> str:
    """Returns the job."""
    events = await _run(stack, _paced("interrupted"), until="job.checkpointed")
    assert events[-1]["type"] == "job.checkpointed"
    stack.compose("stop")
    statuses = {service: stack.state(service)["State"]["ExitCode"] for service in (*SERVICES, "nats")}
    assert statuses == dict.fromkeys(statuses, 0)
    return "interrupted"


def _everything_was_written_down_and_closed(stack: Stack, last_job: str) -> None:
    files = stack.learning("logs")
    logs = [name for name in files if name.rpartition("/")[2].startswith("trainer.log")]
    assert logs
    assert all(name.endswith("trainer.log.jsonl.gz") for name in logs)
    lines = [json.loads(line) for name in sorted(logs) for line in gzip.decompress(files[name]).splitlines()]
    ends = {line["job"]: line["type"] for line in lines if line["type"].startswith("job.")}
    assert ends == {"small": "job.succeeded", "crashed": "job.succeeded", last_job: "job.requeued"}
    stopped = [line["data"]["service"] for line in lines if line["type"] == "service.stopped"]
    assert set(stopped) == set(SERVICES) - {"telemetry"}  # its own last word comes after the log is closed
    assert stopped[0] == "runner"
    keys = [(line["producer"], line["number"]) for line in lines]
    assert len(keys) == len(set(keys))
    metas = [name for name in stack.learning("models") if name.endswith(".meta.json")]
    assert {name.split("/")[1] for name in metas} == {"small", "crashed", last_job}


def _paced(job: str) -> dict[str, object]:
    return {"id": job, "entrypoint": "own:train", "checkpoint": {"every_steps": 10}, "devices": {"kind": "cpu"}}


async def _run(
    stack: Stack, job: dict[str, object], *, at_checkpoint: Callable[[], None] | None = None, until: str = ""
) -> list[dict[str, Any]]:
    """Publish a job as a user would; gives its events up to its end, or up to the first of the type `until`."""
    spec = {"model": job["id"], "dataset": "pydocs", **job}
    async with stack.client() as client:
        await client.jetstream().publish("railbus.jobs.submit", json.dumps(spec).encode())
    return await _follow(stack, str(job["id"]), at_checkpoint=at_checkpoint, until=until)


async def _follow(
    stack: Stack, job: str, *, at_checkpoint: Callable[[], None] | None = None, until: str = ""
) -> list[dict[str, Any]]:
    """A job's single events from its beginning; `at_checkpoint` is called once, at the first one."""
    events: list[dict[str, Any]] = []
    async with stack.client() as client, asyncio.timeout(120):
        subscription = await client.jetstream().subscribe(f"railbus.evt.*.{job}.>", ordered_consumer=True)
        async for message in subscription.messages:
            event = msgpack.unpackb(message.data)
            if "type" not in event:  # a batch
                continue
            events.append(event)
            if event["type"] in {until, *ENDS}:
                break
            if event["type"] == "job.checkpointed" and at_checkpoint is not None:
                at_checkpoint()
                at_checkpoint = None
    return events
