"""A second stack on one host, published on IPv6, whose disks are small: filled, freed, and killed as a whole."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nats.errors
import pytest

from compose_stack import LEASE_TTL_S, SERVICES, Stack
from histories import FINAL
from running_up import PACED
from until import until

pytestmark = [pytest.mark.docker, pytest.mark.timeout(2400)]  # images may have to be built

OVERRIDE = """
services:
{services}
    volumes: ["{entrypoints}:/entrypoints:ro"]
  disk:   # keeps the volumes, which are in memory, while nobody else has them
    image: railbus-telemetry:{tag}
    user: "10001:10001"
    init: true
    network_mode: none
    command: ["sleep", "infinity"]
    volumes: ["learning:/learning", "nats:/data"]
volumes:
  learning: {{driver_opts: {{type: tmpfs, device: tmpfs, o: "size=128m,uid=10001,gid=10001,mode=755"}}}}
  nats: {{driver_opts: {{type: tmpfs, device: tmpfs, o: "size=64m,uid=10001,gid=10001,mode=700"}}}}
"""
SERVICE = """\
  {name}:
    environment:
      RAILBUS_LEASE_TTL_S: "{lease_ttl_s}"
      RAILBUS_HEARTBEAT_S: "0.5"
      RAILBUS_RUNNER_ENTRYPOINT_DIRS: '["/entrypoints"]'
"""
JOB: dict[str, Any] = {
    "model": "m",
    "dataset": "digits",
    "entrypoint": "paced:train",
    "devices": {"kind": "cpu"},
    "params": {"epochs": 12, "pause_s": 0.05},
    "checkpoint": {"every_steps": 20},
}
RUNNING = (*SERVICES, "nats")


class SecondStack(Stack):
    """With disks that can be filled."""

    def fill(self, folder: str) -> None:
        self.compose("exec", "-T", "disk", "sh", "-c", f"cat /dev/zero > {folder}/filler", statuses=(1,))

    def free(self, folder: str) -> None:
        self.compose("exec", "-T", "disk", "rm", f"{folder}/filler")

    def readiness(self, service: str) -> tuple[int, str]:
        """What it says of itself."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[service]}/readyz", timeout=15) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as exc:
            return exc.code, exc.read().decode()

    def are_ready(self) -> bool:
        return all(self.readiness(service)[0] == 200 for service in SERVICES)

    def log(self) -> dict[str, Any]:
        """What `railbus logs --check` finds, on disk alone."""
        return dict(json.loads(self.compose("exec", "-T", "telemetry", "railbus", "logs", "--check", "--json")))


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory, stack: Stack) -> Iterator[SecondStack]:
    """Beside the stack of the other tests, from the same images; up and healthy; removed afterwards."""
    folder = tmp_path_factory.mktemp("second")
    for made in ("deploy", "entrypoints"):
        (folder / made).mkdir()
    (folder / "entrypoints" / "paced.py").write_text(PACED)
    second = SecondStack(
        f"railbus-second-{os.getpid()}",
        _override(folder, tag=stack.tag),
        folder / "deploy",
        ports=_free_ports(),
        tag=stack.tag,
        listen="[::1]",
    )
    try:
        second.up()
        second.compose("exec", "-T", "dataloader", "railbus", "dataset", "import", "digits")
        yield second
    finally:
        second.compose("down", "--volumes", "--timeout", "5")


def _free_ports() -> dict[str, int]:
    """One for each that publishes; NATS does on the other loopback."""
    with contextlib.ExitStack() as held:
        at = {**dict.fromkeys(SERVICES, "127.0.0.1"), "nats": "::1"}
        made = {
            name: held.enter_context(
                socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
            )
            for name, host in at.items()
        }
        return {name: int(each.getsockname()[1]) for name, each in made.items()}


def _override(folder: Path, *, tag: str) -> Path:
    for above in (folder, *folder.parents[:2]):
        above.chmod(above.stat().st_mode | 0o055)  # the containers' users look for what is mounted below
    names = [*(name for name in SERVICES if name != "runner"), "runner"]
    services = "".join(SERVICE.format(name=name, lease_ttl_s=LEASE_TTL_S) for name in names).rstrip("\n")
    path = folder / "override.yaml"
    path.write_text(OVERRIDE.format(services=services, entrypoints=folder / "entrypoints", tag=tag))
    return path


async def test_it_runs_beside_the_first_and_shares_nothing_with_it(stack: Stack, second: SecondStack) -> None:
    ports = second.inspect("nats")["NetworkSettings"]["Ports"]
    published = {name: at for name, at in ports.items() if at}
    assert published == {"4222/tcp": [{"HostIp": "::1", "HostPort": str(second.ports["nats"])}]}
    await second.publish({**JOB, "id": "second-only", "params": {"epochs": 1}})
    assert (await second.ended("second-only"))["state"] == "succeeded"
    assert (await stack.record("second-only"))["code"] == "JOB_NOT_FOUND"
    assert second.seed() != stack.seed()


async def test_a_full_root_is_said_and_costs_nothing_but_time(second: SecondStack) -> None:
    await second.publish({**JOB, "id": "on-a-full-disk"})
    await second.has_checkpoint("on-a-full-disk")
    second.fill("/learning")
    await until(lambda: _says(second, "telemetry", "no space left"))
    await until(lambda: not second.is_healthy("telemetry", restarts=0))
    second.free("/learning")
    await until(second.are_ready)
    record = await second.ended("on-a-full-disk")
    assert (record["state"], record["attempt"], record["lease_epoch"]) == ("succeeded", 1, 1), record
    await until(lambda: _tells_the_end_of(second, "on-a-full-disk"))
    found = second.log()
    assert (found["missing"], found["doubled"], found["broken"]) == (0, 0, 0), found


def _says(second: SecondStack, service: str, problem: str) -> bool:
    status, text = second.readiness(service)
    return status == 503 and problem in text


async def test_a_full_store_takes_nothing_and_does_again_by_itself_once_there_is_room(second: SecondStack) -> None:
    second.fill("/data")
    with pytest.raises((nats.errors.Error, AssertionError, KeyError)):  # it is not acknowledged
        await _publish_many(second)
    await until(lambda: not second.is_healthy("nats", restarts=0))
    second.free("/data")
    await until(lambda: second.is_healthy("nats", restarts=1))
    await until(second.are_ready)
    await second.publish({**JOB, "id": "with-room-again", "params": {"epochs": 1}})
    assert (await second.ended("with-room-again"))["state"] == "succeeded"


async def _publish_many(second: SecondStack) -> None:
    """Jobs with nothing to train."""
    for number in range(100):
        await second.publish({**JOB, "id": f"refused-{number}", "params": {"epochs": 0, "note": "x" * 4000}})


async def test_a_job_ends_once_though_everything_was_killed_at_once(second: SecondStack) -> None:
    await second.publish({**JOB, "id": "all-killed"})
    await second.has_checkpoint("all-killed")
    second.compose("kill", "--signal", "SIGKILL", *RUNNING)
    second.up()
    record = await second.ended("all-killed")
    assert (record["state"], record["attempt"], record["lease_epoch"]) == ("succeeded", 2, 2), record
    await until(lambda: _tells_the_end_of(second, "all-killed"))
    found = second.log()
    assert (found["doubled"], found["broken"]) == (0, 0), found


def _tells_the_end_of(second: SecondStack, job: str) -> bool:
    """Whether it stands in the log, once."""
    lines = second.compose("exec", "-T", "telemetry", "railbus", "logs", job, "--json").splitlines()
    ends = [line for line in map(json.loads, lines) if line["type"] in FINAL]
    assert len(ends) < 2, ends
    return bool(ends)
