"""What `python -m railbus.deployment` leaves for NATS and the services of a deployment in containers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from railbus.deployment import deploy
from railbus.embedded.nats_server import find_server
from railbus.embedded.permissions import USERS
from railbus_shared.bus.connection import Bus
from railbus_shared.errors import ConfigError, NotAuthorized
from railbus_shared.settings import CommonSettings
from until import PATIENCE_S


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "railbus.deployment", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def _seeds(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in (folder / "keys").iterdir()}


def test_it_makes_a_private_key_for_every_user_and_a_configuration(tmp_path: Path) -> None:
    done = _run(str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert set(_seeds(tmp_path)) == set(USERS)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"keys": 0o700, "nats.conf": 0o600} | {f"{user}.nk": 0o600 for user in USERS}
    assert not any(seed.strip() in done.stderr + done.stdout for seed in _seeds(tmp_path).values())


def test_run_again_it_keeps_the_keys_and_the_configuration(tmp_path: Path) -> None:
    assert deploy(tmp_path)
    before, written = _seeds(tmp_path), (tmp_path / "nats.conf").stat()
    assert not deploy(tmp_path)
    assert (_seeds(tmp_path), (tmp_path / "nats.conf").stat().st_ino) == (before, written.st_ino)


def test_a_key_that_is_gone_is_made_anew_and_the_configuration_follows(tmp_path: Path) -> None:
    deploy(tmp_path)
    before = _seeds(tmp_path)
    (tmp_path / "keys" / "user.nk").unlink()
    assert deploy(tmp_path)
    after = _seeds(tmp_path)
    assert {user for user in USERS if after[user] != before[user]} == {"user"}


def test_a_key_that_others_can_read_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    deploy(tmp_path)
    (tmp_path / "nats.conf").unlink()
    (tmp_path / "keys" / "runner.nk").chmod(0o644)
    with pytest.raises(ConfigError, match=r"runner\.nk"):
        deploy(tmp_path)
    done = _run(str(tmp_path))
    assert done.returncode == 2
    assert "chmod 600" in done.stderr
    assert not (tmp_path / "nats.conf").exists()


def test_the_empty_folder_that_docker_makes_of_a_missing_file_gives_way_to_the_key(tmp_path: Path) -> None:
    """A container was started before its key was there: Docker makes a folder of what it cannot find to mount."""
    for user in ("telemetry", "runner"):
        (tmp_path / "keys" / f"{user}.nk").mkdir(parents=True)
    (tmp_path / "keys").chmod(0o755)
    deploy(tmp_path)
    assert set(_seeds(tmp_path)) == set(USERS)
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_holds_something_is_no_key_and_is_kept(tmp_path: Path) -> None:
    kept = tmp_path / "keys" / "telemetry.nk" / "something"
    kept.parent.mkdir(parents=True)
    (tmp_path / "keys").chmod(0o700)
    kept.touch()
    with pytest.raises(ConfigError, match=r"telemetry\.nk' is a folder") as caught:
        deploy(tmp_path)
    assert "remove it" in str(caught.value.hint)
    assert kept.exists()


@pytest.mark.parametrize("command", [("railbus.deployment",), ("railbus.cli.main", "init")], ids=["module", "command"])
def test_rights_are_of_the_prefix_that_the_services_are_told(tmp_path: Path, command: tuple[str, ...]) -> None:
    env = {**os.environ, "RAILBUS_SUBJECT_PREFIX": "team-a"}

    def run(*words: str) -> None:
        subprocess.run([sys.executable, "-m", *words], env=env, capture_output=True, timeout=PATIENCE_S, check=True)

    run(*command, str(tmp_path))
    accounts = json.loads((tmp_path / "nats.conf").read_bytes())["accounts"]
    asked = accounts["PERSON_user"]["users"][0]["permissions"]["publish"]["allow"]
    assert "team-a.jobs.submit" in asked
    assert not any(subject.startswith("railbus.") for subject in asked)
    run("railbus.cli.main", "keys", "add", "ann", "--deployment", str(tmp_path))
    with_ann = json.loads((tmp_path / "nats.conf").read_bytes())["accounts"]
    assert {name: account for name, account in with_ann.items() if name in {"RAILBUS", "PERSON_user"}} == accounts


@pytest.mark.parametrize("arguments", [(), ("one", "two"), ("/dev/null/folder",)])
def test_wrong_arguments_are_told_in_one_line_with_status_2(arguments: tuple[str, ...]) -> None:
    done = _run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert json.loads(done.stderr)["level"] == "error"


async def test_nats_server_runs_with_it_knows_the_users_only_and_answers_the_health_check(tmp_path: Path) -> None:
    """As it is but for what belongs to a container: its ports and its store."""
    deploy(tmp_path)
    config = json.loads((tmp_path / "nats.conf").read_bytes())
    assert (config["listen"], config["http"], config["jetstream"]["store_dir"]) == (
        "0.0.0.0:4222",
        "127.0.0.1:8222",
        "/data",
    )
    config |= {"listen": "127.0.0.1:-1", "http": "127.0.0.1:-1", "ports_file_dir": str(tmp_path)}
    config["jetstream"]["store_dir"] = str(tmp_path / "data")
    (tmp_path / "here.conf").write_text(json.dumps(config))
    with subprocess.Popen([str(find_server()), "-c", str(tmp_path / "here.conf")], stderr=subprocess.PIPE) as server:
        try:
            url, health = _ports(tmp_path)
            assert _status(f"{health}/healthz?js-enabled-only=true") == 200
            key_file = tmp_path / "keys" / "user.nk"
            async with Bus.open(CommonSettings(nats_url=url, nats_key_file=key_file), name="known") as bus:
                assert bus.is_connected
            with pytest.raises(NotAuthorized):
                async with Bus.open(CommonSettings(nats_url=url), name="unknown"):
                    pass
        finally:
            server.terminate()


def _ports(folder: Path) -> tuple[str, str]:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for path in folder.glob("nats-server_*.ports"):
            found = json.loads(path.read_bytes())
            return found["nats"][0], found["monitoring"][0]
        time.sleep(0.02)
    raise AssertionError("nats-server wrote no ports file")


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:  # noqa: S310 - our own server's
            return int(answer.status)
    except urllib.error.HTTPError as exc:
        return exc.code
