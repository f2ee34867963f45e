"""One stack for all of these tests, which run in the order of their file: each leaves it healthy for the next.

Building takes minutes the first time and starting some seconds. The images stay, so that the next run builds only what
has changed; containers, networks and volumes are removed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import thief
from compose_stack import LEASE_TTL_S, SERVICES, Stack
from running_up import PACED

OVERRIDE = """
services:
{services}
    volumes: ["{entrypoints}:/entrypoints:ro"]
"""
SERVICE = """\
  {name}:
    environment:
      RAILBUS_LEASE_TTL_S: "{lease_ttl_s}"
      RAILBUS_HEARTBEAT_S: "0.5"
      RAILBUS_RUNNER_ENTRYPOINT_DIRS: '["/entrypoints"]'
"""
OWNER = 1234
"""Uid to whom the folder of keys belongs, as a checkout does; neither root nor the services'."""


def _engine_or_else() -> None:
    """Skips where no Docker engine answers; with CI set that is a failure."""
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        try:
            subprocess.run(command, capture_output=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError) as exc:
            give_up = pytest.fail if os.environ.get("CI") else pytest.skip
            give_up(f"`{' '.join(command)}` does not answer: {exc}")


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Stack]:
    """Built, up and healthy; told and removed afterwards."""
    _engine_or_else()
    folder = tmp_path_factory.mktemp("compose")
    project = os.environ.get("COMPOSE_PROJECT_NAME", f"railbus-test-{os.getpid()}")
    tag = os.environ.get("RAILBUS_TAG", "test")
    stack = Stack(project, _override(folder), _deploy(folder), ports=_free_ports(), tag=tag)
    try:
        stack.compose("build", timeout_s=1800)
        begun = time.monotonic()
        stack.up()
        _tell(request, f"up to healthy: {time.monotonic() - begun:.1f} s")
        yield stack
    finally:
        if request.session.testsfailed:
            _tell(request, stack.story())
        stack.compose("down", "--volumes", "--timeout", "5")


def _tell(request: pytest.FixtureRequest, text: str) -> None:
    """To whoever watches, which what a fixture prints is not."""
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(f"\n{text}")


def _override(folder: Path) -> Path:
    """Leases that live shortly, and training code of a user's own."""
    (folder / "entrypoints").mkdir()
    (folder / "entrypoints" / "paced.py").write_text(PACED)
    (folder / "entrypoints" / "thief.py").write_text(thief.CODE)
    names = [*(name for name in SERVICES if name != "runner"), "runner"]
    services = "".join(SERVICE.format(name=name, lease_ttl_s=LEASE_TTL_S) for name in names)
    path = folder / "override.yaml"
    path.write_text(OVERRIDE.format(services=services.rstrip("\n"), entrypoints=folder / "entrypoints"))
    return path


def _deploy(folder: Path) -> Path:
    """Closed to all but its owner, as a checkout is that was made with a umask of 077."""
    deploy = folder / "deploy"
    deploy.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(deploy, OWNER, OWNER)
    return deploy


def _free_ports() -> dict[str, int]:
    """One for each that publishes, all free at once."""
    with contextlib.ExitStack() as held:
        sockets = {name: held.enter_context(socket.create_server(("127.0.0.1", 0))) for name in (*SERVICES, "nats")}
        return {name: int(each.getsockname()[1]) for name, each in sockets.items()}
