"""nats.conf as nats-server itself reads it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from railbus.embedded.credentials import ensure_keys
from railbus.embedded.nats_server import find_server
from railbus.embedded.permissions import USERS, policy
from railbus.embedded.server_config import Limits, ServerFiles, render
from railbus_shared.errors import BadSetting
from railbus_shared.subjects import Subjects
from railbus_shared.topology import topology
from until import PATIENCE_S


def _render(folder: Path, *, port: int = 0, prefix: str = "railbus") -> bytes:
    folder.mkdir(exist_ok=True)
    keys = ensure_keys(folder / "keys", USERS)
    return render(ServerFiles(folder), port=port, name="test", keys=keys, policy=policy(prefix))


def _check(folder: Path, config: bytes) -> subprocess.CompletedProcess[str]:
    path = folder / "nats.conf"
    path.write_bytes(config)
    return subprocess.run(
        [str(find_server()), "-t", "-c", str(path)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


@pytest.mark.parametrize("prefix", ["railbus", "team-a.rail_bus"])
@pytest.mark.parametrize("name", ["plain", "with space", 'quote"d', "back\\slash", "ünï", "dollar$KV", "{brace}#hash"])
def test_nats_server_accepts_it_for_any_folder(tmp_path: Path, name: str, prefix: str) -> None:
    folder = tmp_path / name
    checked = _check(folder, _render(folder, port=4222, prefix=prefix))
    assert checked.returncode == 0, checked.stderr


def test_the_check_refuses_what_is_no_configuration(tmp_path: Path) -> None:
    broken = _render(tmp_path).replace(b'"sync_interval": "always"', b'"sync_interval": "sometimes"')
    assert _check(tmp_path, broken).returncode != 0


def test_a_path_with_control_characters_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "new\nline"
    with pytest.raises(BadSetting, match="new"):
        _render(folder)


def test_it_listens_on_loopback_only_and_nowhere_else(tmp_path: Path) -> None:
    config = json.loads(_render(tmp_path, port=4999))
    assert config["listen"] == "127.0.0.1:4999"
    assert not {"http", "https", "cluster", "leafnodes", "gateway", "websocket", "mqtt", "no_auth_user"} & set(config)
    assert json.loads(_render(tmp_path))["listen"] == "127.0.0.1:-1"


def test_it_holds_public_keys_and_no_secret(tmp_path: Path) -> None:
    text = _render(tmp_path).decode()
    for key in ensure_keys(tmp_path / "keys", USERS).values():
        assert key.public in text
        assert key.seed_path.read_text().strip() not in text


def test_our_streams_fit_into_the_store() -> None:
    reserved = sum(stream.max_bytes for stream in topology(Subjects()).streams)
    assert 0 < reserved <= Limits().max_file_bytes
